"""A solver as diffusers takes it: its numbers as scheduler_config.json, the code that plays them, and a model card.

The folder needs nothing of this repository: it can lie anywhere, and be a repository of the Hub as it is. It holds the
solver's own file too, so that `sample.py --predictor_path` takes the folder, or the repository's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from errors import InputError
from files import write_atomically
from models.asset_table import HUB_ID
from models.denoiser import Denoiser, GuidanceKind
from training.networks import Plain
from training.snapshot import snapshot_json
from training.solver import Solver

if TYPE_CHECKING:
    from integrations.diffusers.scheduling_epd import EPDScheduler

CODE = Path(__file__).resolve().parent.parent / "integrations" / "diffusers"
# The pipeline of each family of models, by the name of its backend.
PIPELINES = {
    "ldm": "EPDStableDiffusionPipeline",
    "sdxl": "EPDStableDiffusionXLPipeline",
    "sd3": "EPDStableDiffusion3Pipeline",
}
# What a pipeline is called with, as code: a prompt, but for these, by the name of their backend.
PROMPT = '"a large red star on a white background"'
SUBJECTS = {"dit": "class_labels=[0]", "ddpm": ""}
REPOSITORY = "OWNER/NAME"
SOLVER_FILE = "network-snapshot-000000.json"

_PIPELINE = '''"""The pipeline that `custom_pipeline=` loads from here."""

from .pipeline_epd import {pipeline}
from .scheduling_epd import EPDScheduler  # named here so that diffusers takes the file along

__all__ = ["EPDScheduler", "{pipeline}"]
'''

_CARD = """---
{base_model}library_name: diffusers
license: mit
tags: [few-step, diffusion-solver, rlepd]
---

# A solver of {intervals} intervals for {name}

`scheduler_config.json` holds the solver: the noise levels and points at which the network is asked, the weights of its
answers, and the guidance scales. It was made by RLEPD, after EPD
([arXiv 2507.14797](https://arxiv.org/abs/2507.14797), [arXiv 2512.22796](https://arxiv.org/abs/2512.22796)). The
model's weights are unchanged.

| | |
|---|---|
| base model | {base}{options} |
| licence | MIT for what is in here; the model's weights are elsewhere, under their own licence |
| intervals | {intervals} |
| points in an interval, asked at once | {points} |
| network evaluations of an image, one after another | {parallel} |
| network evaluations of an image, in all | {total} |
| network rows of an image: an evaluation under guidance has two | {rows} |
| guidance | {guidance} |
| noise levels | {sigmas} |

## Use
{use}
## Measured

{measured}
"""

_USE_PIPELINE = """
All points of an interval in one call. `solver` is this folder, or its name on the Hub; `pipe.to("cuda")` and
`torch.float16` where there is a GPU.

```python
import torch
from diffusers import DiffusionPipeline

solver = "."
pipe = DiffusionPipeline.from_pretrained(
    "{base}", custom_pipeline=solver, trust_remote_code=True, torch_dtype=torch.float32)
pipe.load_solver(solver)
pipe({prompt}).images[0].save("image.png")
```

One point after the other, in any pipeline that takes a scheduler (image to image, control nets); from the Hub after
`hf download {repository} --local-dir .`:
"""

_WITHOUT_T5 = """
(A model without T5 is loaded there with `text_encoder_3=None, tokenizer_3=None`.)
"""

_USE_SCHEDULER = """
```python
import sys, torch; sys.path.append(".")  # where scheduling_epd.py lies
from diffusers import DiffusionPipeline
from scheduling_epd import EPDScheduler

pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float32)
pipe.scheduler = EPDScheduler.from_pretrained(".")
images = pipe({arguments}).images
images[0].save("image.png")
```
"""


def scheduler_of(solver: Solver, denoiser: Denoiser) -> EPDScheduler:
    """The solver, settled for a model, as a scheduler of diffusers with that model's noise schedule.

    Raises InputError where it has no table, or a first step without an evaluation (AFS), which no pipeline makes.
    """
    from integrations.diffusers.scheduling_epd import EPDScheduler  # with diffusers, which takes seconds to import

    settled = solver.on(denoiser)
    if settled.table is None:
        raise InputError(
            f"{settled.label}: is no table; make one of it first:  python train.py --init-only --start ..."
        )
    columns = {name: entries.tolist() for name, entries in settled.table.columns().items()}
    try:
        return EPDScheduler(
            sigmas=settled.sigmas.tolist(),
            # The pipelines of models without guidance take no such argument.
            guidance_scale=None if denoiser.guidance is GuidanceKind.NONE else settled.guidance_scale,
            afs=settled.afs,
            **columns,
            **denoiser.scheduler_config,
        )
    except ValueError as error:
        raise InputError(f"{settled.where}: cannot be played by diffusers: {error}") from None


def write_diffusers(
    folder: Path,
    solver: Solver,
    denoiser: Denoiser,
    base: str,
    heldout: Mapping[str, float] | None = None,
    measured_on: str = "held-out prompts",
) -> list[Path]:
    """Write scheduler_config.json, scheduling_epd.py, pipeline_epd.py, pipeline.py, the solver's file and README.md.

    Returns their paths.

    Args:
        folder: is made where it is missing; files of these names are replaced.
        solver: has one table, and was read from a file.
        denoiser: the model that it is for.
        base: what `DiffusionPipeline.from_pretrained` loads that model by; for the model card.
        heldout: what was measured, by the names of `training.ppo.heldout.HELDOUT_METRICS`.
        measured_on: how many of what it was measured on.

    Raises:
        InputError: see `scheduler_of`; or the files cannot be written.
    """
    scheduler = scheduler_of(solver, denoiser)
    texts = {"scheduler_config.json": scheduler.to_json_string()}
    texts |= {name: (CODE / name).read_text(encoding="utf-8") for name in ("scheduling_epd.py", "pipeline_epd.py")}
    pipeline = PIPELINES.get(denoiser.backend)
    if pipeline is not None:
        texts["pipeline.py"] = _PIPELINE.format(pipeline=pipeline)
    measured = _measured(heldout or {}, measured_on)
    texts["README.md"] = _card(solver.on(denoiser), base, denoiser.backend, measured)
    texts[SOLVER_FILE] = snapshot_json(folder / SOLVER_FILE, solver.table, _metadata(solver, base)).decode()
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [folder / name for name in texts]


def lines_for_diffusers(folder: str, base: str, backend: str) -> str:
    """Python that draws an image by an export that lies in `folder`; see `write_diffusers` for the others."""
    import_pipeline = "from diffusers import DiffusionPipeline\n"
    if backend in PIPELINES:
        return (
            f'{import_pipeline}pipe = DiffusionPipeline.from_pretrained(\n    "{base}", custom_pipeline="{folder}", '
            f'trust_remote_code=True)\npipe.load_solver("{folder}")\npipe("...").images[0].save("image.png")'
        )
    return (
        f'import sys; sys.path.append("{folder}")\n{import_pipeline}from scheduling_epd import EPDScheduler\n'
        f'pipe = DiffusionPipeline.from_pretrained("{base}")\n'
        f'pipe.scheduler = EPDScheduler.from_pretrained("{folder}")\n'
        f'pipe({_arguments(SUBJECTS.get(backend, repr("...")))}).images[0].save("image.png")'
    )


def card_on_hub(card: str, repository: str) -> str:
    """The model card of a folder as it is to be read in the repository OWNER/NAME of a hub."""
    return card.replace('solver = "."', f'solver = "{repository}"').replace(REPOSITORY, repository)


def _metadata(solver: Solver, base: str) -> dict[str, Plain]:
    """What the solver's file says, its model by a name that others know, where it has one."""
    said = dict(solver.origin.metadata)
    return said | ({"model_path": base} if said.get("model_path") and HUB_ID.fullmatch(base) else {})


def _arguments(subject: str) -> str:
    """What a stock pipeline with the scheduler is called with, as code."""
    return ", ".join(filter(None, (subject, "**pipe.scheduler.pipeline_arguments()")))


def _card(solver: Solver, base: str, backend: str, measured: str) -> str:
    """The model card, Markdown; `solver` is settled."""
    cost, scales = solver.evaluations, solver.table.guidance
    by_evaluation = scales is not None and f"a scale for each evaluation, {scales.min():g} to {scales.max():g}"
    arguments = _arguments(SUBJECTS.get(backend, PROMPT))
    use = (_USE_PIPELINE if backend in PIPELINES else "") + (_WITHOUT_T5 if backend == "sd3" else "") + _USE_SCHEDULER
    return _CARD.format(
        base_model=f"base_model: {base}\n" if HUB_ID.fullmatch(base) else "",
        name=Path(base).name,
        base=f"[{base}](https://huggingface.co/{base})" if HUB_ID.fullmatch(base) else base,
        options=f", loaded with {solver.model_options}" if solver.model_options.changes() else "",
        intervals=solver.num_steps - 1,
        points=solver.table.num_points or "none: the network is asked at its start alone",
        parallel=cost.parallel,
        total=cost.total,
        rows=cost.rows,
        guidance=by_evaluation or f"{solver.guidance_scale:g}",
        sigmas=", ".join(f"{level:.4g}" for level in solver.sigmas.tolist()),
        use=use.format(base=base, prompt=PROMPT, arguments=arguments, repository=REPOSITORY),
        measured=measured,
    )


def _measured(heldout: Mapping[str, float], measured_on: str) -> str:
    judges = [judge for judge in ("reward", "panel") if f"heldout/{judge}_difference" in heldout]
    if not judges:
        return "Nothing was measured."
    rows = [
        f"| on {measured_on} | start of the tuning | this solver | difference, 95% interval |",
        "|---|---|---|---|",
    ]
    for judge in judges:
        ours, start, difference, low, high = (
            heldout[f"heldout/{judge}{of}"]
            for of in ("", "_start", "_difference", "_difference_low", "_difference_high")
        )
        rows.append(f"| {judge} | {start:.4f} | {ours:.4f} | {difference:+.4f} [{low:+.4f}, {high:+.4f}] |")
    return "\n".join(rows)
