"""A small network in the layout of clean-fid's InceptionV3 file, and a small CLIP in the place of CMMD's."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from benchmarks.rehearse_evaluation import StandInInception
from models import asset_table, clip
from models.asset_table import AssetFile
from models.digests import digest_of

WIDTH = 6
TINY_CLIP = {
    "embed_dim": 5,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
}


def put_extractors(monkeypatch, root: Path) -> None:
    """Write both networks below `root` and let the table of assets name them, as if they were the published ones."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what FID's network is published in
        torch.manual_seed(3)
        (root / "weights").mkdir(parents=True, exist_ok=True)
        torch.jit.script(StandInInception(WIDTH)).save(root / "weights" / "inception.pt")
        clip.new_clip(TINY_CLIP).save_pretrained(root / "weights" / "clip")
    monkeypatch.setattr(asset_table, "ROOT", root)
    monkeypatch.setattr(asset_table, "INCEPTION", _published(root, "weights/inception.pt"))
    files = [_published(root, f"weights/clip/{name}") for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(asset_table, "CLIP_336", tuple(files))


def _published(root: Path, path: str) -> AssetFile:
    file = root / path
    return AssetFile(path, f"https://example.com/{path}", file.stat().st_size, f"sha256:{digest_of(file)}")
