from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError

from errors import InputError
from models.fingerprints import fingerprint
from models.pixel_diffusion import load_pixel_diffusion, save_pixel_diffusion
from tests.ddpm.tiny_ddpm import SHAPE, tiny_network, write_tiny_ddpm


@pytest.fixture
def folder(tmp_path):
    return write_tiny_ddpm(tmp_path / "ddpm")


def outputs(network):
    with torch.no_grad():
        return network(torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)), 7).sample


def test_a_pipeline_folder_comes_back_as_it_was_written(folder):
    model = load_pixel_diffusion(str(folder))
    assert torch.equal(outputs(model.network), outputs(tiny_network()))
    assert model.image_size == SHAPE[1:]
    assert model.prediction_type == "epsilon"
    assert model.clip_range is None
    assert len(model.alphas_cumprod) == 100
    assert model.alphas_cumprod[0].item() == pytest.approx(1 - 1e-3)
    assert not model.network.training


def test_the_flat_layout_of_the_first_public_ddpms_loads(folder, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(folder / "unet", flat)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", flat)
    assert torch.equal(outputs(load_pixel_diffusion(str(flat)).network), outputs(tiny_network()))


def test_a_state_dict_needs_an_architecture_and_then_wins_over_its_weights(folder, tmp_path):
    other = tiny_network(seed=1)
    file = tmp_path / "alone" / "ddpm.pth"
    file.parent.mkdir()
    torch.save(other.state_dict(), file)
    with pytest.raises(InputError, match=r"path\.architecture"):
        load_pixel_diffusion(str(file))
    model = load_pixel_diffusion(str(file), str(folder))
    assert torch.equal(outputs(model.network), outputs(other))


def test_a_state_dict_of_another_architecture_lists_the_differences(folder, tmp_path):
    state = tiny_network(channels=(8, 24)).state_dict()
    del state["conv_in.bias"]
    state["strange.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "ddpm.pth")
    with pytest.raises(InputError) as caught:
        load_pixel_diffusion(str(tmp_path / "ddpm.pth"), str(folder))
    for part in ("1 missing (conv_in.bias)", "strange.weight", "of another shape"):
        assert part in str(caught.value)


OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_a_state_dict_with_an_attentions_older_names_loads(folder, tmp_path):
    other = tiny_network(seed=1)
    renamed = {}
    for name, tensor in other.state_dict().items():
        for newer, older in OLDER.items():
            name = name.replace(f".{newer}.", f".{older}.")
        renamed[f"module.{name}"] = tensor
    assert sum("proj_attn" in name for name in renamed) > 0
    torch.save(renamed, tmp_path / "ddpm.pth")
    assert torch.equal(outputs(load_pixel_diffusion(str(tmp_path / "ddpm.pth"), str(folder)).network), outputs(other))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"layers_per_block": 2**31}),
        ("unet/config.json", {"block_out_channels": [2**20, 2**20]}),
        ("unet/config.json", {"act_fn": 0.5}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("unet/config.json", {"sample_size": "large"}),
        ("unet/config.json", {"sample_size": [8, 2**40]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 2**40}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": [100]}),
        ("scheduler/scheduler_config.json", {"beta_start": 10**400}),
        ("scheduler/scheduler_config.json", {"clip_sample": True, "clip_sample_range": "wide"}),
        ("scheduler/scheduler_config.json", {"clip_sample": True, "clip_sample_range": 0}),
        ("scheduler/scheduler_config.json", {"thresholding": True}),
        ("scheduler/scheduler_config.json", {"_class_name": 3}),
    ],
)
@pytest.mark.parametrize("weights", ["its own", "a state dict"])
def test_a_configuration_of_any_size_or_type_ends_in_one_message(folder, tmp_path, file, changes, weights):
    spec, architecture = str(folder), None
    if weights == "a state dict":
        torch.save(tiny_network().state_dict(), tmp_path / "ddpm.pth")
        spec, architecture = str(tmp_path / "ddpm.pth"), str(folder)
    described = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(described | changes))
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        load_pixel_diffusion(spec, architecture)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def test_damaged_weights_of_a_tuned_ddpm_are_refused(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_pixel_diffusion(str(folder))


def test_what_is_not_there_is_explained_without_asking_the_network(tmp_path):
    with pytest.raises(InputError, match="hf download nobody/no-such-ddpm"):
        load_pixel_diffusion("nobody/no-such-ddpm")
    with pytest.raises(InputError, match="there is no such DDPM"):
        load_pixel_diffusion(str(tmp_path / "a" / "b" / "c"))


def test_models_of_other_kinds_are_refused(folder):
    config = folder / "unet" / "config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps(before | {"sample_size": None}))
    with pytest.raises(InputError, match="sample_size"):
        load_pixel_diffusion(str(folder))
    config.write_text(json.dumps(before))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    described = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(described | {"prediction_type": "score"}))
    with pytest.raises(InputError, match="prediction_type 'score'"):
        load_pixel_diffusion(str(folder))


def test_a_model_of_gray_images_is_refused(tmp_path, folder):
    config = load_pixel_diffusion(str(folder)).scheduler_config
    save_pixel_diffusion(tiny_network(image_channels=1), config, tmp_path / "gray")
    with pytest.raises(InputError, match="takes 1 channels"):
        load_pixel_diffusion(str(tmp_path / "gray"))


def test_writing_replaces_the_whole_folder_and_leaves_nothing_beside_it(folder):
    (folder / "old.txt").write_text("old")
    config = load_pixel_diffusion(str(folder)).scheduler_config
    save_pixel_diffusion(tiny_network(seed=5), config, folder)
    assert torch.equal(outputs(load_pixel_diffusion(str(folder)).network), outputs(tiny_network(seed=5)))
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert not (folder / "old.txt").exists()


def test_a_folder_that_cannot_be_written_is_an_error(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = load_pixel_diffusion(str(folder)).scheduler_config
    with pytest.raises(InputError, match="cannot be written"):
        save_pixel_diffusion(tiny_network(), config, tmp_path / "file" / "ddpm")


def test_a_full_disk_leaves_the_ddpm_that_was_there(folder, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")  # what the library raises for it

    before = fingerprint([folder])
    config = load_pixel_diffusion(str(folder)).scheduler_config
    monkeypatch.setattr(UNet2DModel, "save_pretrained", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        save_pixel_diffusion(tiny_network(seed=5), config, folder)
    assert fingerprint([folder]) == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
