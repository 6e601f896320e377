"""The first command of the second job: `python -m scripts.train_reward_model --cfg configs/smoke.yaml`."""

from __future__ import annotations

from pathlib import Path

import click

from errors import shows_input_errors
from training.ddpm.command import load_job, training_options
from training.ddpm.jobs import TRAIN_REWARD_MODEL, train_reward_model
from training.runs.command_line import SeveralPairs


@click.command(cls=SeveralPairs, context_settings={"max_content_width": 110})
@training_options
@shows_input_errors
def main(
    cfg: Path | None, overrides: tuple[str, ...], device: str | None, resume: Path | None, overwrite: bool
) -> None:
    """Train the reward model, real images against generated ones and noise, and the judge beside it.

    \b
    python -m scripts.train_reward_model --cfg configs/smoke.yaml
    python -m scripts.train_reward_model --cfg configs/default.yaml --override path.real_img=photos path.fake_img=drawn
    """
    config, resumed = load_job(TRAIN_REWARD_MODEL, cfg, overrides, device, resume)
    train_reward_model(config, resumed, overwrite=overwrite)


if __name__ == "__main__":
    main()
