"""The rehearsal's parts, with assets of a few thousand weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import rehearse_sd15
from benchmarks.rehearse_sd15 import Scale, copy_house, run, run_commands, write_assets
from errors import InputError
from models import clip
from models.asset_table import COCO_PROMPTS, HPS, SD15_CKPT
from models.latent_diffusion import LatentDiffusion
from models.loading import assemble_compvis, load_tokenizer, read_compvis, read_json
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
    house = copy_house(tmp_path_factory.mktemp("rehearsal"))
    pipeline = house / rehearse_sd15.PIPELINE
    tiny_unet().save_config(pipeline / "unet")
    tiny_vae().save_config(pipeline / "vae")
    (pipeline / "text_encoder" / "config.json").write_text(json.dumps(TEXT_ENCODER))
    (house / "src/pipelines/clip/ViT-H-14.json").write_text(json.dumps(CLIP))
    list(write_assets(house))
    return house


def test_the_assets_are_in_the_true_formats(house):
    pipeline, checkpoint = house / rehearse_sd15.PIPELINE, house / SD15_CKPT.path
    parts = assemble_compvis(read_compvis(checkpoint), checkpoint, pipeline)
    denoiser = LatentDiffusion("tiny", parts, device=torch.device("cpu"), dtype=torch.float32)
    prompts = read_prompts(house / COCO_PROMPTS.path)
    assert prompts == list(rehearse_sd15.CAPTIONS)
    denoiser.validate_prompts(prompts)
    x = torch.ones(1, 4, 8, 8)
    assert denoiser.denoise(x, torch.tensor(1.0), denoiser.encode(prompts[:1])).isfinite().all()
    model = clip.load_open_clip_checkpoint(
        house / HPS["v2.1"].path, read_json(house / "src/pipelines/clip/ViT-H-14.json")
    )
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


def test_a_command_that_fails_is_shown(tmp_path):
    with pytest.raises(InputError, match=r"ended with 3:\nno such luck"):
        run(tmp_path, sys.executable, "-c", "print('no such luck'); raise SystemExit(3)")
    passed = run(tmp_path, sys.executable, "-c", "print('x' * 10**6)")
    assert passed.seconds > 0
    assert passed.memory > 10**6


@pytest.mark.slow
def test_the_true_commands_run_on_them(house):
    scale = Scale(2, 2, 1, 2, ("model.dtype=float32",))
    passed = list(run_commands(house, scale, "cpu"))
    assert [one.command.split()[1] for one in passed] == ["train.py", "launch_rl.sh", "launch_rl.sh", "-m", "sample.py"]
    assert list(house.glob("exps/*-rehearsal/export/*.pkl"))
