"""The commands that are struck: how they begin, how one goes on after a strike, and what they are to end with."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.ddpm.tiny_ddpm import write_tiny_ddpm
from training.ppo.tests.tiny_world import write_world
from training.runs.checkpoint import list_checkpoints
from training.snapshot import load_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """A command, in the words of a shell; `{world}` stands for the folder with everything that it reads.

    Attributes:
        module: as for `python -m`.
        begin: its arguments.
        go_on: its arguments after a strike, seen what lies in its folder; None: as it began.
    """

    module: str
    begin: str
    go_on: Callable[[Path], str | None]


def _again(folder: Path) -> None:
    """The same command."""


def _resumed(pattern: str, more: str = "") -> Callable[[Path], str | None]:
    """A run with a checkpoint is resumed, one without begins anew."""

    def go_on(folder: Path) -> str | None:
        runs = [run for run in sorted(folder.glob(pattern)) if list_checkpoints(run / "checkpoints")]
        return f"--resume {runs[-1].relative_to(folder)}{more}" if runs else None

    return go_on


def _resumed_distillation(folder: Path) -> str | None:
    runs = sorted(folder.glob("exps/0*-*"))
    return f"--resume {runs[-1].relative_to(folder)}" if runs else None


STEPS = ("ppo.steps=3", "ppo.rollout_batch_size=4", "logging.save_interval=1", "logging.preview_prompts=1")
COMMANDS = {
    "launch": Command(
        "training.ppo.launch",
        f"--config {{world}}/config.yaml --override run.output_root=exps {' '.join(STEPS)}",
        _resumed("exps/*-tiny"),
    ),
    "train": Command(
        "train",
        "--dataset_name tiny --model_path {world}/model --prompt-file {world}/train.csv --num_steps 3 --M 1 "
        "--trajectories 4 --batch 2 --total_kimg 0.008 --device cpu",
        _resumed_distillation,
    ),
    "train_reward_model": Command(
        "scripts.train_reward_model",
        "--cfg {world}/smoke.yaml --override path.runs=runs path.ddpm={world}/ddpm train_reward.save=reward.pt",
        _resumed("runs/*-train_reward_model", " --overwrite"),
    ),
    "finetune": Command(
        "scripts.finetune",
        "--cfg {world}/smoke.yaml --override path.runs=runs path.ddpm={world}/ddpm path.rm={world}/classifier.pt "
        "finetune.save=tuned finetune.save_interval=1",
        _resumed("runs/*-finetune", " --overwrite"),
    ),
    "evaluate": Command(
        "evaluate",
        "--device cpu --model {world}/model --reward {world}/reward.pt --prompt-file {world}/final.csv --number 6 "
        "--batch 4 --guidance 3 --schedules discrete --outdir out --cache cache --reference-steps 4 "
        "--solvers ddim --nfe 2",
        _again,
    ),
    "tuning_study": Command("benchmarks.tuning_study", "{world}/study.yaml --output study --cache cache", _again),
}


def write_everything(world: Path) -> None:
    """What the commands read; but for the classifiers that `finetune` needs, which `train_reward_model` writes."""
    write_world(world)
    write_tiny_ddpm(world / "ddpm")
    (world / "final.csv").write_text("text\n" + "\n".join("hijklm"))
    shutil.copy(REPOSITORY / "configs" / "smoke.yaml", world)
    arm = {
        "config": str(world / "config.yaml"),
        "overrides": [*STEPS, "logging.eval_interval=1"],
        "seeds": [0],
        "starts": [str(world / "start")],
    }
    study = {"arms": {"ppo": arm}, "heldout_prompts": str(world / "final.csv"), "heldout_count": 6}
    study |= {"solvers": ["ddim"], "schedules": ["discrete"], "plateau": 2}
    (world / "study.yaml").write_text(yaml.safe_dump(study))


RUN = re.compile(r"^(?P<root>exps|runs|study/runs)/(?:\d{8}-\d{6}|\d{5})(?P<name>-[^/]+)")
TIMED = re.compile(
    r"\.html$|\.tfevents\.|\.log$|-before-resume-at-|/before-resume-at-|/export-manifest-|"
    r"^cache/|^out/(results\.json|report)"
)
"""Files that tell the time or the hash of a pickle, or that only a resumed run has."""


def without_time(name: str) -> str:
    """A path without the time or the number that its run's name begins with."""
    return RUN.sub(r"\g<root>/\g<name>", name)


def left(folder: Path) -> dict[str, str]:
    """What lies in a folder in the end, times and seconds aside: the hash of each file's content by its path.

    Of runs with one name the newest counts alone: the others ended before they had a checkpoint.
    """
    names = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    runs = [run[0] for run in map(RUN.match, names) if run]
    newest = {without_time(run): run for run in runs}.values()
    return {
        without_time(name): hashlib.sha256(_content(path)).hexdigest()
        for name, path in names.items()
        if path.is_file() and not TIMED.search(name) and (RUN.match(name) is None or RUN.match(name)[0] in newest)
    }


def _content(path: Path) -> bytes:
    with suppress(Exception):  # what was cut off is compared as it is
        if path.suffix == ".pt":
            return repr(_plain(torch.load(path, weights_only=True))).encode()
        if path.suffix == ".pkl":  # its bytes depend on which strings a process has shared
            return repr(_plain(load_snapshot(path)[0].columns())).encode()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            return json.dumps(
                [{key: row[key] for key in row if not key.startswith("seconds")} for row in rows]
            ).encode()
    return re.sub(rb"\d{8}-\d{6}-", b"", path.read_bytes())


def _plain(value: Any) -> Any:
    """Tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            [*value.shape],
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex(),
        )
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
