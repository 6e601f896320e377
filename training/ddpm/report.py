"""The page of an evaluation: what fine-tuning did, in words and side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape

from torch import Tensor

from models.pictures import as_png, to_pixels
from training.ddpm.comparison import comparison_lines
from training.ddpm.config import SAMPLED, DDPMConfig
from training.measuring.page import StripRow, commands, folded, page, strip, verdict
from training.measuring.statistics import Interval
from training.runs.configuration import to_yaml
from training.runs.run_folder import RunFolder


def evaluation_page(
    folder: RunFolder, config: DDPMConfig, metrics: Mapping[str, float], images: Mapping[str, Tensor]
) -> bytes:
    """One HTML file; `images`: [N, 3, H, W] in [0, 1], by what they are. Those of the two DDPMs have equal seeds."""
    title = folder.path.name
    _, low, high = Interval.from_metrics(metrics, "heldout/judge_difference")
    kind, word = ("better", "Better") if low > 0 else ("worse", "Worse") if high < 0 else ("open", "Not told apart")
    headline = f"{word}, by the judge that nothing was trained against"
    if metrics["heldout/suspected_reward_hacking"]:
        kind, headline = "worse", "Suspected reward hacking"
    rows = [
        StripRow(f"image {number + 1}", "", {name: as_png(to_pixels(ones[number])) for name, ones in images.items()})
        for number in range(min(config.eval.shown, *map(len, images.values())))
    ]
    said = [f"{config.eval.num_img} images of equal seeds from {config.path.ddpm} and from {config.finetune.save}."]
    fakes = " The fakes that the reward model learned from are the start's." if config.path.fake_img == SAMPLED else ""
    typed, tuned = shlex.quote(str(folder.config)), shlex.quote(config.finetune.save)
    next_commands = {
        "Draw more, and judge them": f"python -m scripts.eval --cfg {typed} --override eval.num_img=512",
        "Go on from the fine-tuned DDPM": f"python -m scripts.finetune --cfg {typed} --override path.ddpm={tuned} "
        "finetune.save=ANOTHER",
    }
    return page(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            verdict(kind, headline, said),
            "".join(f"<p>{escape(line)}</p>" for line in comparison_lines(metrics)),
            "<h2>Before and after</h2><p class=muted>Start and fine-tuned have equal noise in each row, with which "
            f"the others have nothing to do.{fakes}</p>",
            strip(rows, side=max(next(iter(images.values())).shape[-2:])),
            f"<h2>What next</h2>{commands(next_commands)}",
            folded("Configuration", [f"<pre>{escape(to_yaml(config))}</pre>"]),
        ],
    )
