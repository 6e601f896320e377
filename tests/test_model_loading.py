"""Models from folders and files: what is right loads exactly, what is wrong is explained, no code of a file runs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.compvis_layout import compvis_state_dict, unet_names, vae_names
from errors import InputError
from models import devices, load_denoiser, registry
from models.checkpoints import read_state_dict
from models.compvis import assemble_compvis, read_compvis
from models.devices import check_compiler, resolve_device
from models.families.stable_diffusion import StableDiffusion
from models.fingerprints import model_fingerprint
from models.latent_diffusion import Parts
from models.loading import load_tokenizer, read_json
from models.pipelines import load_folder
from tests.tiny_pipeline import modules_of, save_tiny_pipeline, tiny_tokenizer, tiny_unet

SD15 = registry.SOURCE / registry.COMPVIS_CONFIGS


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_arguments):
        raise AssertionError("a model asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A pipeline folder that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def compvis(tiny) -> dict[str, Tensor]:
    """The weights of the tiny pipeline under the names of the CompVis code, with the extras of a real file."""
    state = compvis_state_dict(*modules_of(load_folder(tiny)[1]))
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    state["alphas_cumprod"] = torch.linspace(0.9, 0.1, 1000)
    return {name: tensor.clone() for name, tensor in state.items()}


def load(path: Path):
    return load_denoiser(path, device="cpu", dtype=torch.float32)


def assert_same_weights(ours: Parts, theirs: Parts) -> None:
    for mine, other in zip(modules_of(ours), modules_of(theirs), strict=True):
        expected, found = other.state_dict(), mine.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- what is right


def test_loading_leaves_the_global_random_state_alone_and_shows_no_bars(tiny, compvis, tmp_path, capsys):
    save_file(compvis, tmp_path / "tiny.safetensors")
    before = torch.random.get_rng_state()
    load_folder(tiny)
    assemble_compvis(read_compvis(tmp_path / "tiny.safetensors"), tmp_path, tiny)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capsys.readouterr().err == ""


def test_a_safetensors_file_loads_exactly(tiny, compvis, tmp_path):
    save_file(compvis, tmp_path / "tiny.safetensors")
    parts = assemble_compvis(read_compvis(tmp_path / "tiny.safetensors"), tmp_path, tiny)
    assert_same_weights(parts, load_folder(tiny)[1])
    from_file = StableDiffusion("tiny", parts, device=torch.device("cpu"), dtype=torch.float32)
    from_folder = load(tiny)
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    estimates = [model.denoise(x, sigma, model.encode(["red box"])) for model in (from_file, from_folder)]
    assert torch.equal(*estimates)


@pytest.mark.parametrize("nested", [True, False])
def test_a_ckpt_file_loads_exactly(tiny, compvis, tmp_path, nested):
    torch.save({"state_dict": compvis, "global_step": 840000} if nested else compvis, tmp_path / "tiny.ckpt")
    parts = assemble_compvis(read_compvis(tmp_path / "tiny.ckpt"), tmp_path, tiny)
    assert_same_weights(parts, load_folder(tiny)[1])


def lightning_class(name: str) -> type:
    """A class that pickles as `pytorch_lightning.callbacks.<name>`, as Lightning's checkpoints hold."""
    return type(name, (), {"__module__": "pytorch_lightning.callbacks.made_up"})


def test_the_bookkeeping_of_lightning_is_passed_over_without_being_imported(compvis, tmp_path, monkeypatch):
    kind = lightning_class("ModelCheckpoint")
    keeper = kind()
    keeper.best_model_score = 0.5
    module = types.ModuleType("pytorch_lightning.callbacks.made_up")
    module.ModelCheckpoint = kind
    with monkeypatch.context() as patch:
        # pickle imports the parent as well, and the real one takes seconds
        patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"state_dict": compvis, "callbacks": {kind: {"keeper": keeper}}}, tmp_path / "lightning.ckpt")
    assert module.__name__ not in sys.modules
    state = read_state_dict(tmp_path / "lightning.ckpt")
    assert state.keys() == compvis.keys()
    assert all(torch.equal(state[name], compvis[name]) for name in state)
    assert module.__name__ not in sys.modules


def test_the_committed_configurations_are_those_of_sd15():
    """Sizes and names of the published checkpoint: 859.5, 83.7 and 123.1 million weights."""
    unet_config, vae_config = read_json(SD15 / "unet/config.json"), read_json(SD15 / "vae/config.json")
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(unet_config), AutoencoderKL.from_config(vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15 / "text_encoder"))
    assert [sum(weight.numel() for weight in part.parameters()) for part in (unet, vae, text_encoder)] == [
        859_520_964,
        83_653_863,
        123_060_480,
    ]
    state = compvis_state_dict(unet, vae, text_encoder)
    assert {
        name: tuple(state[name].shape)
        for name in (
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            "model.diffusion_model.input_blocks.9.0.op.weight",
            "model.diffusion_model.output_blocks.2.1.conv.weight",
            "model.diffusion_model.output_blocks.5.2.conv.weight",
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
            "first_stage_model.decoder.mid.attn_1.q.weight",
            "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        )
    } == {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    }
    prefixed = {f"model.diffusion_model.{name}": weight for name, weight in unet_names(unet).items()}
    assert convert_ldm_unet_checkpoint(prefixed, unet_config).keys() == unet.state_dict().keys()
    prefixed = {f"first_stage_model.{name}": weight for name, weight in vae_names(vae).items()}
    assert convert_ldm_vae_checkpoint(prefixed, vae_config).keys() == vae.state_dict().keys()


def test_vocabulary_and_merges_are_a_tokenizer_without_tokenizer_json(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    shutil.copy(SD15 / "tokenizer/tokenizer_config.json", tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("red box").input_ids == tokenizer("red box").input_ids
    assert loaded.model_max_length == 77
    assert loaded.pad_token == "<|endoftext|>"


# --- what is missing or unknown


def test_missing_sd15_files_are_all_named_with_sizes_and_remedies(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "SOURCE", tmp_path)
    for attempt in (lambda: load("sd15"), lambda: registry.check_assets("sd15")):
        with pytest.raises(InputError) as error:
            attempt()
        message = str(error.value)
        for part in (
            "src/ms_coco/v1-5-pruned-emaonly.safetensors (4,265,146,304 bytes)",
            "src/ms_coco/v1-5-pruned-emaonly.ckpt (4,265,380,512 bytes)",
            "src/pipelines/sd15/tokenizer/vocab.json (1,059,962 bytes)",
            "src/pipelines/sd15/tokenizer/merges.txt (524,619 bytes)",
            "python -m models.assets fetch sd15",
            "shapes",
        ):
            assert part in message


def test_only_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "SOURCE", tmp_path)
    for present in ("ms_coco/v1-5-pruned-emaonly.ckpt", "pipelines/sd15/tokenizer/vocab.json"):
        (tmp_path / present).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / present).touch()
    with pytest.raises(InputError, match=r"merges\.txt") as error:
        load("sd15")
    assert "emaonly" not in str(error.value)
    assert "vocab" not in str(error.value)


def test_a_single_file_without_its_tokenizer_says_what_to_fetch(monkeypatch, compvis, tmp_path):
    monkeypatch.setattr(registry, "SOURCE", tmp_path / "src")
    save_file(compvis, tmp_path / "tiny.safetensors")
    for attempt in (load, lambda path: registry.check_assets(str(path))):
        with pytest.raises(InputError, match=r"vocab\.json \(1,059,962 bytes\)") as error:
            attempt(tmp_path / "tiny.safetensors")
        assert "fetch tokenizer" in str(error.value)


@pytest.mark.parametrize("name", registry.SHAPES_WORLD)
def test_a_registered_folder_that_is_missing_says_how_it_is_come_by(name, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "SOURCE", tmp_path)
    with pytest.raises(
        InputError,
        match=f"^Model {name} needs files that are not there:\n  src/{name}\n(.*\n)*.*git checkout -- src/{name}$",
    ):
        load(name)


@pytest.mark.parametrize("name", registry.SHAPES_WORLD)
def test_registered_names_load_from_their_places_and_know_their_words(name, monkeypatch, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / name)
    monkeypatch.setattr(registry, "SOURCE", tmp_path)
    denoiser = load(name)
    assert denoiser.name == name
    with pytest.raises(InputError, match="zebra"):
        denoiser.validate_prompts(["a zebra"])


@pytest.mark.parametrize(
    ("spec", "says"),
    [("shape", "Did you mean shapes"), ("sd-15", "Did you mean sd15"), ("someone/model", "assets fetch someone/model")],
)
def test_unknown_names_are_answered_with_the_known_ones(spec, says):
    with pytest.raises(InputError, match=says) as error:
        load(spec)
    assert "(shapes, shapes_flow, sd15, sdxl, sd3, flux)" in str(error.value)


def test_a_hubs_pipeline_is_found_in_its_cache(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--model"
    shutil.copytree(tiny, repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    monkeypatch.chdir(tmp_path)
    assert load_denoiser("someone/model", device="cpu", dtype=torch.float32).name == "model"
    assert model_fingerprint("someone/model") == model_fingerprint(tiny)


def single_file(folder: Path, state: dict[str, Tensor], suffix: str, **metadata: str) -> Path:
    path = folder / f"marked{suffix}"
    torch.save(state, path) if suffix == ".ckpt" else save_file(state, path, metadata=metadata)
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_single_file_marked_as_predicting_v_is_used_so(tiny, compvis, tmp_path, suffix):
    path = single_file(tmp_path, {**compvis, "v_pred": torch.empty(0)}, suffix)
    marked = assemble_compvis(read_compvis(path), path, tiny)
    assert marked.process.prediction == "v_prediction"
    assert_same_weights(marked, load_folder(tiny)[1])
    _, folder = load_folder(save_tiny_pipeline(tmp_path / "predicts-v", prediction_type="v_prediction"))
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    models = [
        StableDiffusion("v", parts, device=torch.device("cpu"), dtype=torch.float32) for parts in (marked, folder)
    ]
    assert torch.equal(*(model.denoise(x, sigma, model.encode(["red box"])) for model in models))


@pytest.mark.parametrize(
    ("metadata", "prediction_type"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "V_prediction"}, "v_prediction"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"}, "epsilon"),
        ({"modelspec.predict_key": "eps", "format": "pt"}, "epsilon"),
    ],
)
def test_a_single_files_metadata_says_what_it_predicts(tiny, compvis, tmp_path, metadata, prediction_type):
    path = single_file(tmp_path, compvis, ".safetensors", **metadata)
    assert assemble_compvis(read_compvis(path), path, tiny).process.prediction == prediction_type


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, {}, "zero terminal SNR"),
        ({"ztsnr": torch.empty(0)}, {}, "zero terminal SNR"),
        ({"alphas_cumprod": torch.linspace(0.99, 0, 1000)}, {}, "zero terminal SNR"),
        ({}, {"ss_zero_terminal_snr": "True"}, "zero terminal SNR"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "EDM"),
        ({}, {"modelspec.prediction_type": "sample"}, "predicts sample; one of epsilon and v"),
        ({"v_pred": torch.empty(0)}, {"modelspec.prediction_type": "epsilon"}, "epsilon and it has the tensor v_pred"),
        ({}, {"modelspec.predict_key": "v", "modelspec.prediction_type": "epsilon"}, "epsilon and v"),
    ],
)
def test_a_single_file_that_no_solver_here_suits_is_refused(compvis, tmp_path, tensors, metadata, says):
    path = single_file(tmp_path, {**compvis, **tensors}, ".safetensors", **metadata)
    for attempt in (load, lambda file: registry.check_assets(str(file))):
        with pytest.raises(InputError, match=says):
            attempt(path)


# --- what is wrong


def payload(path: Path) -> object:
    class Payload:
        def __reduce__(self):
            return (open, (str(path), "w"))

    return Payload()


@pytest.mark.parametrize("how", ["torch.save", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_happens(tmp_path, how):
    mark, file = tmp_path / "was-run", tmp_path / "model.ckpt"
    content = {"state_dict": {"weight": torch.zeros(1)}, "extra": payload(mark)}
    if how == "torch.save":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"extra": payload(mark)}))
    with pytest.raises(InputError) as error:
        load(file)
    assert not mark.exists()
    assert ("io.open" in str(error.value)) == (how == "torch.save")
    torch.load(file, weights_only=False) if how == "torch.save" else pickle.loads(file.read_bytes())
    assert mark.exists()  # the payload is a real one


def sdxl_names() -> dict[str, Tensor]:
    names = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
    )
    return {name: torch.zeros(1, 4) for name in names}


def single_file_of(folder: Path, kind: str, compvis: dict[str, Tensor]) -> Path:
    """Files that people really put in the place of a model."""
    whole, cut = folder / "whole.safetensors", folder / "model.safetensors"
    if kind == "html":
        (folder / "model.ckpt").write_text("<!DOCTYPE html><html>404</html>")
        return folder / "model.ckpt"
    if kind == "html as safetensors":
        cut.write_text("\n<html>Sign in</html>")
    elif kind == "lfs pointer":
        cut.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n")
    elif kind == "empty":
        cut.touch()
    elif kind == "cut safetensors":
        save_file(compvis, whole)
        cut.write_bytes(whole.read_bytes()[:-1000])
    elif kind == "cut ckpt":
        torch.save(compvis, whole)
        (folder / "model.ckpt").write_bytes(whole.read_bytes()[:-1000])
        return folder / "model.ckpt"
    elif kind == "other suffix":
        (folder / "model.bin").touch()
        return folder / "model.bin"
    elif kind == "list":
        torch.save([torch.zeros(1)], folder / "model.ckpt")
        return folder / "model.ckpt"
    else:
        save_file(state_of(kind, compvis), cut)
    return cut


def state_of(kind: str, compvis: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "sdxl":
        return sdxl_names()
    if kind == "sd2":
        key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
        return {key: torch.zeros(2, 1024)}
    if kind == "inpainting":
        return {**compvis, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    if kind == "unet part":
        return {name: weight for name, weight in compvis.items() if name.startswith("model.")}
    if kind == "lora":
        return {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)}
    if kind == "diffusers unet":
        return {name: weight.clone() for name, weight in tiny_unet().state_dict().items()}
    if kind == "vae alone":
        return {"decoder.conv_in.weight": torch.zeros(1)}
    return {"something": torch.zeros(1)}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("html", "HTML"),
        ("html as safetensors", "HTML"),
        ("lfs pointer", "git lfs pull"),
        ("empty", "empty"),
        ("cut safetensors", "cut off"),
        ("cut ckpt", "cut off"),
        ("other suffix", r"must end in \.safetensors"),
        ("list", "holds a list"),
        ("sdxl", r"of Stable Diffusion XL \(xl_base\).*fetch sd15"),
        ("sd2", "2.x"),
        ("inpainting", "inpainting"),
        ("unet part", "no VAE"),
        ("lora", "LoRA"),
        ("diffusers unet", "UNet alone"),
        ("vae alone", "VAE alone"),
        ("unrelated", "something"),
    ],
)
def test_wrong_single_files_are_explained(tmp_path, compvis, kind, says):
    file = single_file_of(tmp_path, kind, compvis)
    with pytest.raises(InputError, match=says) as error:
        load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("kind", ["html", "cut safetensors", "cut ckpt", "sdxl", "unet part", "diffusers unet"])
def test_what_cannot_be_used_is_seen_without_loading_it(tmp_path, compvis, kind):
    file = single_file_of(tmp_path, kind, compvis)
    with pytest.raises(InputError) as loaded:
        load(file)
    with pytest.raises(InputError) as looked_at:
        registry.check_assets(str(file))
    assert str(looked_at.value) == str(loaded.value)


def test_too_little_memory_is_not_blamed_on_the_file(tiny, compvis, tmp_path, monkeypatch):
    """As torch says it where the address space is limited (ulimit -v)."""
    torch.save(compvis, tmp_path / "tiny.ckpt")

    def fail(*_arguments, **_options):
        raise RuntimeError("unable to mmap 4265362381 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", fail)
    for path in (tiny, tmp_path / "tiny.ckpt"):
        with pytest.raises(RuntimeError, match=r"^unable to mmap"):
            load(path)


def test_the_look_gives_the_model_without_its_numbers(tiny, compvis, tmp_path, monkeypatch):
    configs = tmp_path / "src/pipelines/sd15"
    shutil.copytree(tiny, configs)
    tokenizer = configs / "tokenizer"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    monkeypatch.setattr(registry, "SOURCE", tmp_path / "src")
    save_file(compvis, tmp_path / "tiny.safetensors")
    torch.save(compvis, tmp_path / "tiny.ckpt")
    for spec in (tiny, tmp_path / "tiny.safetensors", tmp_path / "tiny.ckpt"):
        looked_at, loaded = registry.check_assets(str(spec)), load(spec)
        assert {weight.device.type for weight in looked_at.network.parameters()} == {"meta"}
        assert looked_at.latent_shape == loaded.latent_shape
        looked_at.validate_prompts(["red box"])
        with pytest.raises(InputError, match="tokens long"):
            looked_at.validate_prompts(["red " * 30])


def lose_a_weight(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: weight for key, weight in load_file(file).items() if key != "conv_in.bias"}, file)


def misshape_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "final_layer_norm.bias": torch.zeros(5)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lose_a_weight, r"1 missing \(conv_in.bias\)"),
        (misshape_a_weight, r"1 of another shape \(.*final_layer_norm.bias\)"),
        (lambda folder: edit_json(folder / "unet" / "config.json", in_channels=9), "conv_in.weight"),
        (lambda folder: edit_json(folder / "vae" / "config.json", latent_channels=8), "another shape"),
        (lambda folder: edit_json(folder / "unet" / "config.json", sample_size=None), "sample_size is None"),
        (lambda folder: edit_json(folder / "scheduler" / "scheduler_config.json", beta_end=2), "beta"),
    ],
)
def test_what_does_not_fit_together_is_seen_without_reading_weights(copy, spoil, says):
    spoil(copy)
    for attempt in (load, lambda folder: registry.check_assets(str(folder))):
        with pytest.raises(InputError, match=says):
            attempt(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_weight_that_is_missing_or_misshapen_is_named(tiny, compvis, name, damage):
    state = {key: weight for key, weight in compvis.items() if key != name}
    if damage == "misshapen":
        state[name] = torch.zeros(len(compvis[name]) + 1)
    with pytest.raises(InputError, match=r"conv_out\.bias|final_layer_norm\.bias"):
        assemble_compvis(state, Path("model.ckpt"), tiny)


def test_a_checkpoint_of_another_size_is_explained(compvis):
    with pytest.raises(InputError, match="do not fit a UNet2DConditionModel"):
        assemble_compvis(compvis, Path("model.ckpt"), SD15)


def test_a_folder_that_is_no_pipeline_says_what_it_is(tiny, tmp_path):
    for attempt in (load, lambda folder: registry.check_assets(str(folder))):
        with pytest.raises(InputError, match="single UNet2DConditionModel"):
            attempt(tiny / "unet")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"model_index.json is missing.*notes.txt"):
        load(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pipeline_of_another_family_is_refused(copy):
    edit_json(copy / "model_index.json", _class_name="PixArtAlphaPipeline")
    for attempt in (load, lambda folder: registry.check_assets(str(folder))):
        with pytest.raises(InputError, match=r"holds a PixArtAlphaPipeline.*Known are: StableDiffusionPipeline"):
            attempt(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(InputError, match=f"{part} are missing"):
        load(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["absent", "cut", "weight missing"])
def test_damaged_component_weights_are_named(copy, part, damage):
    file = next((copy / part).glob("*.safetensors"))
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        weights.pop(sorted(weights)[0])
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        load(copy)
    assert str(copy / part) in str(error.value)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
        ("unet/config.json", {"time_cond_proj_dim": 4}, "unet"),
        ("unet/config.json", {"layers_per_block": 2**31}, "far more than"),
        ("unet/config.json", {"block_out_channels": [2**12, 2**12]}, "its files hold"),
        ("unet/config.json", {"act_fn": 3}, "no readable UNet2DConditionModel"),
        ("unet/config.json", {"sample_size": "large"}, "config.json sample_size is 'large'"),
        ("vae/config.json", {"norm_num_groups": 0}, "no readable AutoencoderKL"),
        ("text_encoder/config.json", {"num_hidden_layers": 2**31}, "no readable CLIPTextModel"),
        ("text_encoder/config.json", {"hidden_act": 3}, "no readable CLIPTextModel"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 2**40}, "more than 1,000,000"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.9] * 400}, "the last noise level is infinite"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": [3]}, "model_max_length"),
    ],
)
def test_settings_that_cannot_be_used_are_named(copy, file, changes, says):
    edit_json(copy / file, **changes)
    with pytest.raises(InputError, match=says):
        load(copy)


def test_parts_that_do_not_fit_each_other_are_refused(copy):
    tiny_unet(in_channels=9).save_pretrained(copy / "unet")
    with pytest.raises(InputError, match="inpainting"):
        load(copy)
    tiny_unet(cross_attention_dim=20).save_pretrained(copy / "unet")
    with pytest.raises(InputError, match="width 20"):
        load(copy)
    tiny_unet(class_embed_type="timestep").save_pretrained(copy / "unet")
    with pytest.raises(InputError, match="class_embed_type"):
        load(copy)


def test_broken_small_files_are_named(copy):
    (copy / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no readable CLIP tokenizer"):
        load(copy)
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt missing"):
        load(copy)
    (copy / "model_index.json").write_text("[1]")
    with pytest.raises(InputError, match="JSON object"):
        load(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="no readable JSON"):
        load(copy)


# --- devices and types


@pytest.mark.parametrize(("device", "variable", "usual"), [("cpu", "CXX", "g++"), ("cuda", "CC", "gcc or clang")])
def test_compiling_needs_a_compiler(device, variable, usual, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=re.escape(f"a compiler for {device}, and {usual} is not there")):
        check_compiler(torch.device(device))
    mine = tmp_path / "mine"
    mine.touch(mode=0o755)
    monkeypatch.setenv(variable, str(mine))
    check_compiler(torch.device(device))


def test_devices_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "", "CPU", "cuda:4096"])
def test_unknown_or_absent_devices_are_refused(name):
    with pytest.raises(InputError, match=r"nknown device|asked for"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_devices_that_are_not_there_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=name):
        resolve_device(name)


MEMORY_V2 = {
    "memory.max": "1000000\n",
    "memory.current": "400000\n",
    "memory.stat": "anon 5\ninactive_file 100000\nactive_file 7\n",
}
MEMORY_V1 = {
    "memory.limit_in_bytes": "1000000\n",
    "memory.usage_in_bytes": "400000\n",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMORY_V2, 700_000),
        (MEMORY_V1, 700_000),
        ({**MEMORY_V2, "memory.current": "2000000\n"}, 0),
        ({**MEMORY_V2, "memory.max": "max\n"}, 8_192_000),
        ({**MEMORY_V2, "memory.max": "9223372036854771712\n"}, 8_192_000),
        ({}, 8_192_000),
    ],
)
def test_free_memory_is_that_of_the_container_where_it_is_less(files, free, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:       16000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(devices, "MEMORY_OF_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "MEMORY_OF_CONTAINER", (tmp_path / "nowhere", tmp_path))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert devices.free_memory(torch.device("cpu")) == free
