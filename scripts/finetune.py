"""The second command of the second job: `python -m scripts.finetune --cfg configs/smoke.yaml`."""

from __future__ import annotations

from pathlib import Path

import click

from errors import shows_input_errors
from scripts.preference import preference_reward
from training.ddpm.command import load_job, training_options
from training.ddpm.jobs import FINETUNE, finetune
from training.runs.command_line import SeveralPairs


@click.command(cls=SeveralPairs, context_settings={"max_content_width": 110})
@training_options
@shows_input_errors
def main(
    cfg: Path | None, overrides: tuple[str, ...], device: str | None, resume: Path | None, overwrite: bool
) -> None:
    """Fine-tune the DDPM at path.ddpm against the reward model, and write the result to finetune.save.

    \b
    python -m scripts.finetune --cfg configs/smoke.yaml
    python -m scripts.finetune --cfg configs/shapes.yaml --override finetune.kl_coef=0.01 seed=1
    python -m scripts.finetune --resume runs/<timestamp>-finetune
    """
    config, resumed = load_job(FINETUNE, cfg, overrides, device, resume)
    finetune(config, resumed, preference_reward, overwrite=overwrite)


if __name__ == "__main__":
    main()
