"""All that a run needs, tiny and random but in the true file formats: pipeline, reward, panel, prompts, predictor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from solvers import EPDTable
from tests.plain_clip import random_plain_clip, write_letter_tokenizer
from tests.tiny_pipeline import save_tiny_pipeline
from training.snapshot import save_snapshot

CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 55, "width": 32, "heads": 2, "layers": 1},
}
START = EPDTable(
    torch.tensor([[0.3, 0.6], [0.4, 0.8]], dtype=torch.float64),
    torch.tensor([[0.5, 0.5], [0.6, 0.4]], dtype=torch.float64),
)
METADATA = {
    "dataset_name": "tiny",
    "guidance_type": "cfg",
    "guidance_rate": 2.0,
    "schedule_type": "discrete",
    "schedule_rho": 1.0,
    "afs": False,
}


def write_world(folder: Path) -> Path:
    """Write everything to `folder`; returns the path of the configuration."""
    save_tiny_pipeline(folder / "model")
    write_letter_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("reward", "panel")):
        weights = random_plain_clip(CLIP, seed).state_dict()
        torch.save({"state_dict": weights}, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps({"model_cfg": CLIP, "tokenizer": "tokenizer"}))
    (folder / "train.csv").write_text("text\n" + "\n".join("abcdefg"))
    (folder / "heldout.csv").write_text("text\n" + "\n".join("uvwxyz"))
    save_snapshot(folder / "start" / "network-snapshot-000001.pkl", START, METADATA)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(folder)))
    return path


def configuration(folder: Path) -> dict[str, dict[str, Any]]:
    """A run of four steps of eight images, evaluated every other step."""
    return {
        "run": {"output_root": str(folder / "exps"), "run_name": "tiny", "device": "cpu"},
        "data": {"predictor_snapshot": str(folder / "start"), "prompt_csv": str(folder / "train.csv")},
        "model": {"model_path": str(folder / "model")},
        "reward": {"weights_path": str(folder / "reward.pt")},
        "ppo": {
            "steps": 4,
            "rollout_batch_size": 8,
            "rloo_k": 4,
            "minibatch_size": 4,
            "learning_rate": 0.005,
        },
        "logging": {
            "save_interval": 2,
            "eval_interval": 2,
            "eval_prompts": str(folder / "heldout.csv"),
            "eval_count": 6,
            "preview_prompts": 2,
            "panel": str(folder / "panel.pt"),
            "cache": str(folder / "cache"),
        },
    }
