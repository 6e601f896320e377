"""The third command of the second job: `python -m scripts.eval --cfg configs/smoke.yaml`."""

from __future__ import annotations

from pathlib import Path

import click

from errors import shows_input_errors
from scripts.preference import preference_reward
from training.ddpm.command import common_options, load_config
from training.ddpm.jobs import evaluate
from training.runs.command_line import SeveralPairs


@click.command(cls=SeveralPairs, context_settings={"max_content_width": 110})
@common_options
@shows_input_errors
def main(cfg: Path | None, overrides: tuple[str, ...], device: str | None) -> None:
    """Hold the fine-tuned DDPM at finetune.save against the one it started from, path.ddpm, on equal seeds.

    \b
    python -m scripts.eval --cfg configs/smoke.yaml
    python -m scripts.eval --cfg configs/shapes.yaml --override eval.num_img=512
    """
    evaluate(load_config(cfg, overrides, device), preference_reward)


if __name__ == "__main__":
    main()
