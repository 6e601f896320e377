"""The rehearsal's parts, with assets of a few thousand weights."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import rehearse_evaluation, rehearse_sd15
from benchmarks.rehearse_sd15 import (
    Scale,
    copy_house,
    describe,
    describe_phases,
    prepare_store,
    run,
    run_commands,
    step_phases,
    write_assets,
    write_checkpoint,
)
from errors import InputError
from models import clip
from models.asset_table import COCO_PROMPTS, HPS, SD15_CKPT
from models.checkpoints import read_state_dict
from models.compvis import assemble_compvis, read_compvis
from models.families.stable_diffusion import StableDiffusion
from models.loading import load_tokenizer, read_json
from models.prompts import read_prompts
from tests.tiny_pipeline import tiny_unet, tiny_vae

VOCABULARY = 2 * 256 + 100 + 2
TEXT_ENCODER = {
    "model_type": "clip_text_model",
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the checkout whose configurations are those of a tiny Stable Diffusion, with its assets."""
    folder = tmp_path_factory.mktemp("rehearsal")
    store, house = prepare_store(folder), copy_house(folder)
    make_tiny(house)
    list(write_assets(house, store))
    return house


def make_tiny(house: Path) -> None:
    """Let a copy of the checkout be of a tiny Stable Diffusion and a tiny HPS."""
    pipeline = house / rehearse_sd15.PIPELINE
    tiny_unet().save_config(pipeline / "unet")
    tiny_vae().save_config(pipeline / "vae")
    (pipeline / "text_encoder" / "config.json").write_text(json.dumps(TEXT_ENCODER))
    (house / rehearse_sd15.CLIP_CONFIG).write_text(json.dumps(CLIP))


def test_the_assets_are_in_the_true_formats(house):
    pipeline, checkpoint = house / rehearse_sd15.PIPELINE, house / SD15_CKPT.path
    parts = assemble_compvis(read_compvis(checkpoint), checkpoint, pipeline)
    denoiser = StableDiffusion("tiny", parts, device=torch.device("cpu"), dtype=torch.float32)
    prompts = read_prompts(house / COCO_PROMPTS.path)
    assert prompts == list(rehearse_sd15.CAPTIONS)
    denoiser.validate_prompts(prompts)
    x = torch.ones(1, 4, 8, 8)
    assert denoiser.denoise(x, torch.tensor(1.0), denoiser.encode(prompts[:1])).isfinite().all()
    model = clip.load_open_clip_checkpoint(house / HPS["v2.1"].path, read_json(house / rehearse_sd15.CLIP_CONFIG))
    tokens = clip.tokenize(load_tokenizer(pipeline / "tokenizer"), prompts, 77)
    assert clip.text_features(model, tokens).isfinite().all()


def test_the_tokenizer_has_the_size_and_the_marks_of_clips(tmp_path):
    rehearse_sd15.write_tokenizer(tmp_path, 49408)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 49408
    ids = tokenizer("a giraffe").input_ids
    assert (ids[0], ids[-1]) == (49406, 49407)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a giraffe"
    with pytest.raises(InputError, match="vocabulary of 100"):
        rehearse_sd15.write_tokenizer(tmp_path, 100)


def test_what_was_made_is_not_made_again(house):
    store = prepare_store(house.parent)
    made = {file: file.stat().st_mtime_ns for file in store.iterdir()}
    assert len(made) == 2
    for path in (SD15_CKPT.path, HPS["v2.1"].path):
        (house / path).unlink()
    assert [one.what.split()[0] for one in write_assets(house, store)] == ["found", "found"]
    assert {file: file.stat().st_mtime_ns for file in store.iterdir()} == made
    assert (house / SD15_CKPT.path).stat().st_size > 10_000


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint(tmp_path / "model.ckpt", {"weight": torch.ones(3), "wrong": lambda: None})
    assert not (tmp_path / "model.ckpt").exists()
    write_checkpoint(tmp_path / "model.ckpt", {"weight": torch.ones(3)})
    assert torch.equal(read_state_dict(tmp_path / "model.ckpt")["weight"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(rehearse_sd15.main, ["--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds something else than a rehearsal" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_command_that_fails_is_shown(tmp_path):
    run(tmp_path, sys.executable, "-c", "print('before')")
    with pytest.raises(InputError, match=r"ended with 3:\nno such luck$"):
        run(tmp_path, sys.executable, "-c", "print('no such luck'); raise SystemExit(3)")
    passed = run(tmp_path, sys.executable, "-c", "print('x' * 10**6); raise SystemExit(3)", status=3)
    assert passed.seconds > 0
    assert passed.memory > 10**6
    assert "before" in (tmp_path / rehearse_sd15.LOG).read_text()


MEASURES = """
import sys, torch
from pathlib import Path
from benchmarks.rehearse_sd15 import own_peak, run
torch.ones(10**8)
house = Path(sys.argv[1])
print(own_peak(), *(run(house, sys.executable, "-c", code).memory for code in ("", "held = bytearray(10**9)")))
"""


@pytest.mark.skipif(not rehearse_sd15.RESETS_PEAK.exists(), reason="this system has no way to forget a peak")
def test_a_commands_memory_is_its_own(tmp_path):
    # In a process of its own: a command is handed down what its parent holds when it starts, here the tests before.
    told = subprocess.run([sys.executable, "-c", MEASURES, str(tmp_path)], capture_output=True, text=True, check=True)
    before, empty, held = map(int, told.stdout.split())
    assert empty < before - 300 * 10**6
    assert 10**9 < held < 1.2 * 10**9


@pytest.mark.slow
def test_the_true_commands_run_on_them(house):
    passed = list(run_commands(house, Scale(2, 2, 1, 2, ("model.dtype=float32",)), "cpu"))
    commands = [one.what.split()[1:3] for one in passed]
    assert commands == [
        ["-m", "models.assets"],
        ["train.py", "--dataset_name"],
        ["launch_rl.sh", "--device"],
        ["launch_rl.sh", "--device"],
        ["-m", "training.ppo.export_epd_predictor"],
        ["sample.py", "--predictor_path"],
    ]
    log = (house / rehearse_sd15.LOG).read_text()
    assert f"WRONG   {SD15_CKPT.path}" in log
    assert "nothing was trained" in log
    assert list(house.glob("exps/*-rehearsal/export/*.pkl"))
    phases = step_phases(house)
    assert phases.keys() == {"text", "network", "solver", "decode", "reward", "update", "other"}
    table = "\n".join([*describe(passed), *describe_phases(phases)])
    assert all(what in table for what in [*phases, *(one.what for one in passed)])


@pytest.mark.slow
def test_the_evaluation_of_the_baseline_runs_on_them(tmp_path, monkeypatch):
    """In a house of its own, tiny like the other: its table of assets is changed."""
    store, house = prepare_store(tmp_path), copy_house(tmp_path)
    make_tiny(house)
    monkeypatch.setattr(rehearse_evaluation, "VIT_L_14", CLIP)
    monkeypatch.setattr(rehearse_evaluation, "FEATURES", 6)
    made = [*write_assets(house, store), *rehearse_evaluation.write_judges(house, store)]
    assert [one.what.split()[0] for one in made] == ["made"] * 3
    list(rehearse_evaluation.run_commands(house, 1, None, "float32", "cpu"))
    log = (house / rehearse_sd15.LOG).read_text()
    assert "every file is there" in log
    assert "4 images, fid, legacy resizing" in log
    assert "(published: 12.03)" not in log  # of nine intervals, not of one
    content = json.loads((house / "outputs" / "evaluation" / "results.json").read_text())
    measured = {(row["label"], row["metric"]) for row in content["results"]}
    for label in ("epd-00000", "dpm2", "ipndm", "dpmpp"):
        assert {(label, metric) for metric in ("reward", "clip_score", "fid_legacy")} <= measured
