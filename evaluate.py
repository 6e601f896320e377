"""Hold solvers and predictors side by side on the same prompts and the same noise."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from errors import InputError, shows_input_errors
from files import only_writer
from models import Denoiser, load_denoiser
from models.devices import DTYPES, resolve_device, resolve_dtype
from models.fingerprints import model_fingerprint
from models.options import ModelOptions
from models.pictures import to_pixels
from models.prompts import first_prompts
from models.registry import is_unconditional
from training.measuring.comparison import CLASSICAL_BASELINE, TOTAL, Comparison, Entry, parse_baseline
from training.measuring.evaluation import (
    PREVIEWS,
    REFERENCE_SCHEDULE,
    REFERENCE_SOLVER,
    REFERENCE_STEPS,
    Evaluation,
    Measured,
    Setting,
    Store,
    reference_solver,
)
from training.measuring.report import Report
from training.ppo.panels import SHAPES, judging_panel, true_images
from training.ppo.rewards import find_reward_files
from training.runs.command_line import Finite, require_one_process, takes_model_options
from training.solver import (
    CLASSICAL,
    TRIED_SCHEDULES,
    Solver,
    classical_solvers,
    load_solver,
    parse_classical,
    parse_schedule,
)

SHAPES_REWARD = Path("weights/shapes_reward.pt")
USUAL_PROMPTS = Path("src/prompts/shapes_heldout.csv")
SHAPES_VALIDATION = Path("src/prompts/shapes_validation.csv")
USUAL_REWARD = Path("weights/HPS_v2.1_compressed.pt")

EXAMPLES = """
\b
Examples:
  python evaluate.py --model shapes --solvers epd,ddim,heun,dpm2,dpmpp,ipndm --nfe 4,6,8,12,20
  python evaluate.py --solvers epd,dpmpp,dpmpp:2 --nfe 4,8 --predictor_path 1 --baseline classical --baseline dpmpp@8
  python evaluate.py --nfe 4 --guidances 1.5,2,3,5,7.5 --schedules discrete,polynomial

Every measurement is kept: the same call again is quick, and one that was stopped goes on.
"""


@click.command(epilog=EXAMPLES)
@click.option("--model", default=SHAPES, show_default=True, help="Registered name, pipeline folder or single file.")
@click.option(
    "--solvers",
    default=",".join(["epd", *CLASSICAL]),
    show_default=True,
    help="Separated by commas; multistep ones with an order after a colon where not the highest is meant: dpmpp:2.",
)
@click.option("--nfe", default="4,6,8,12,20", show_default=True, help="Parallel evaluations, before guidance.")
@click.option(
    "--schedules",
    default=",".join(TRIED_SCHEDULES),
    show_default=True,
    help="Tried for every classical solver, NAME or NAME:RHO; each metric is reported at the best.",
)
@click.option(
    "--guidances",
    help="Constant guidance scales tried likewise, 1.5,3,7.5. Guidance is a choice that every solver deserves. "
    "[--guidance]",
)
@click.option(
    "--validation-file",
    type=click.Path(path_type=Path),
    help="Prompts on which schedule and guidance are chosen. [shapes: its validation prompts; otherwise those that are "
    "scored, which favours the classical solvers]",
)
@click.option(
    "--validation-number",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="How many of them, from the top.",
)
@click.option(
    "--predictor_path",
    "predictors",
    multiple=True,
    help="EPD table: file, folder or experiment number; may be repeated. [all in --exps that were made for the model]",
)
@click.option("--exps", type=click.Path(path_type=Path), default=Path("exps"), show_default=True, help="Experiments.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    default=(CLASSICAL_BASELINE, f"{CLASSICAL_BASELINE}@{TOTAL}"),
    show_default=True,
    help="What differences are taken to, may be repeated: classical (the best of them), or a solver's or predictor's "
    "label; at as many parallel evaluations, at those after an @ (classical@8), or at as many in all (@total).",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    help=f"A .txt (one a line) or .csv (column `text`); none for an unconditional model. [{USUAL_PROMPTS}]",
)
@click.option(
    "--number", type=click.IntRange(min=2), default=128, show_default=True, help="Prompts, from the top; or images."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="First noise seed; bootstrap seed."
)
@click.option(
    "--guidance",
    type=Finite(min=0),
    help="Guidance scale of the reference and of the classical solvers, a choice: what is best differs by model and by "
    "solver. [the model's own]",
)
@click.option(
    "--reward",
    "reward_path",
    type=click.Path(path_type=Path),
    help="Preference checkpoint, or pickscore, clip_score, aesthetic, imagereward, mps, or my_module:my_reward. "
    f"[{SHAPES_REWARD} for shapes, otherwise {USUAL_REWARD}]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Images at once; raise it where the device has the memory.",
)
@click.option(
    "--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("outputs/evaluation"), show_default=True
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("outputs/evaluation-cache"),
    show_default=True,
    help="Where latents and measurements are kept; latents of Stable Diffusion take 64 kB an image and sampler.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Of the network.")
@shows_input_errors
@takes_model_options
def main(
    model: str,
    solvers: str,
    nfe: str,
    schedules: str,
    guidances: str | None,
    validation_file: Path | None,
    validation_number: int,
    predictors: tuple[str, ...],
    exps: Path,
    baselines: tuple[str, ...],
    prompt_file: Path | None,
    number: int,
    seed: int,
    guidance: float | None,
    reward_path: Path | None,
    batch: int,
    outdir: Path,
    cache: Path,
    device: str,
    dtype: str,
    model_options: ModelOptions,
) -> None:
    """Print and save a table of solvers: reward, verifier, Fréchet distance, distance to a 200-step reference.

    Every prompt has one noise, the same for all solvers. Written to --outdir: report.md, results.csv, results.json,
    metrics.png, and for each parallel NFE a sheet of images at each solver's best schedule by reward.
    """
    require_one_process()
    names, budgets = _listed(solvers, "--solvers"), _budgets(nfe)
    tried = [parse_schedule(text) for text in _listed(schedules, "--schedules")]
    classical = [name for name in names if name != "epd"]
    for name in classical:
        parse_classical(name)
    if predictors and "epd" not in names:
        raise InputError("--predictor_path is given, but --solvers has no epd: add it")
    weights = reward_path or (SHAPES_REWARD if model == SHAPES else USUAL_REWARD)
    chosen_on = validation_file or (SHAPES_VALIDATION if model == SHAPES else None)
    if is_unconditional(model):
        _refuse_prompts(model, reward_path, {"--prompt-file": prompt_file, "--validation-file": validation_file})
        prompts, asked = [""] * number, f"{number} images without a prompt"
    else:
        prompt_file = prompt_file or USUAL_PROMPTS
        prompts, asked = first_prompts(prompt_file, number), f"the first {number} of {prompt_file}"
    find_reward_files(weights)
    validation_prompts = None if chosen_on is None else first_prompts(chosen_on, validation_number)
    tables = _predictors(model, model_options, predictors, exps, budgets) if "epd" in names else []

    number_type = resolve_dtype(dtype)
    denoiser = load_denoiser(model, device=resolve_device(device), dtype=number_type, options=model_options)
    denoiser.validate_prompts([*prompts, *(validation_prompts or [])])
    scale = denoiser.default_guidance_scale if guidance is None else guidance
    scales = [scale] if guidances is None else _scales(guidances)
    if f"{CLASSICAL_BASELINE}@{TOTAL}" in baselines:
        budgets = sorted({*budgets, *(table.evaluations.total for table in tables)})
    rivals = [
        rival.guided(one).on(denoiser)
        for rival in classical_solvers(classical, budgets, tried, note=click.echo)
        for one in scales
    ]
    silent = [table.guidance_scale is None and not table.has_guidance_column for table in tables]
    tables = [
        (table.guided(scale) if says_none else table).on(denoiser)
        for table, says_none in zip(tables, silent, strict=True)
    ]
    if not tables and not rivals:
        raise InputError(
            "nothing to compare: no solver can spend any of the evaluations of --nfe, and there is no predictor"
        )
    chosen_baselines = [
        parse_baseline(text, list(dict.fromkeys(solver.label for solver in [*tables, *rivals]))) for text in baselines
    ]

    click.get_current_context().with_resource(only_writer(outdir))
    scene = Scene(
        denoiser=denoiser,
        model=model,
        model_options=model_options,
        weights=weights,
        store=Store(cache, click.echo),
        guidance_scale=scale,
        seed=seed,
        batch=batch,
        dtype=torch.promote_types(number_type, torch.float32),
    )
    validation = None
    if validation_prompts is not None and len(rivals) > len({(one.label, one.num_steps) for one in rivals}):
        click.echo(f"{len(rivals)} settings of classical solvers on {len(validation_prompts)} prompts of {chosen_on}")
        validation = scene.choose(rivals, validation_prompts)
        rivals = validation.contenders()
    click.echo(f"{len(tables) + len(rivals)} solvers and the reference on {asked}")
    comparison, reference, real = scene.compare([*tables, *rivals], prompts, validation)
    click.echo("taking intervals, about a second a solver")
    report = Report(
        comparison=comparison,
        differences=comparison.differences(chosen_baselines),
        reference=reference,
        real=None if real is None else to_pixels(real[:PREVIEWS]),
        prompts=prompts,
        settings={
            "command": shlex.join(["python", *sys.argv]),
            "model": f"{model}, {model_options} (sha256 {scene.model_sha256[:16]})",
            "prompts": f"{asked}, seeds {seed} to {seed + number - 1}",
            "guidance": scale,
            "reference": f"{REFERENCE_SOLVER}, {REFERENCE_STEPS} steps, {REFERENCE_SCHEDULE}, from the same noise",
            "preference model": str(weights),
            "Fréchet distance to": "true images of the same captions" if real is not None else "the reference's images",
            "schedules tried": ", ".join(map(str, tried)),
            "guidance scales tried": ", ".join(f"{one:g}" for one in scales),
            "chosen on": "these prompts"
            if validation is None
            else f"the first {validation_number} of {chosen_on}, seeds {seed} to {seed + validation_number - 1}",
            "predictors": ", ".join(f"{table.label} = {table.where}" for table in tables) or "none",
            "torch": torch.__version__,
            "device": f"{denoiser.device}, {dtype}",
        },
    )
    files = report.write(outdir)
    click.echo("\n\n".join(["", report.table(), *report.difference_tables(), ""]))
    click.echo("wrote " + ", ".join(map(str, files)))


@dataclass(frozen=True)
class Scene:
    """What stays the same from one set of prompts to another."""

    denoiser: Denoiser
    model: str
    model_options: ModelOptions
    weights: Path
    store: Store
    guidance_scale: float
    seed: int
    batch: int
    dtype: torch.dtype

    @cached_property
    def model_sha256(self) -> str:
        """Of the model's files, and how it was loaded."""
        return model_fingerprint(self.model, self.model_options)

    def compare(
        self, solvers: Sequence[Solver], prompts: Sequence[str], validation: Comparison | None
    ) -> tuple[Comparison, Measured, Tensor | None]:
        """Solvers and the reference on prompts, and true images [N, 3, H, W] where the world can draw them."""
        fine = reference_solver(self.denoiser, self.guidance_scale)
        evaluation, entries = self._measured(solvers, prompts, fine)
        reference, real = evaluation.reference(), self._real(prompts)
        target = reference.features if real is None else self._features(evaluation, real, prompts)
        compared = Comparison(entries, target, self.store, seed=self.seed, validation=validation)
        return compared, reference, real

    def choose(self, solvers: Sequence[Solver], prompts: Sequence[str]) -> Comparison:
        """Solvers on the prompts that settings are chosen on: no reference, whose evaluations are most of the work."""
        evaluation, entries = self._measured(solvers, prompts, None)
        real = self._real(prompts)
        target = None if real is None else self._features(evaluation, real, prompts)
        return Comparison(entries, target, self.store, seed=self.seed)

    def _measured(
        self, solvers: Sequence[Solver], prompts: Sequence[str], reference: Solver | None
    ) -> tuple[Evaluation, list[Entry]]:
        setting = Setting(
            prompts=prompts,
            seeds=[self.seed + index for index in range(len(prompts))],
            model_fingerprint=self.model_sha256,
            batch_size=self.batch,
            dtype=self.dtype,
            previews=PREVIEWS,
        )
        panel = judging_panel(self.model, self.weights, self.denoiser, prompts, self.batch)
        entries = []
        with tqdm(unit="evaluation") as bar:
            evaluation = Evaluation(self.denoiser, panel, setting, self.store, bar.update, reference=reference)
            bar.reset(total=evaluation.evaluations_ahead(solvers))
            if reference is not None:
                bar.set_description("reference")
                evaluation.reference()
            for solver in solvers:
                bar.set_description(f"{solver.label} {solver.grid_name}, NFE {solver.evaluations.parallel}")
                entries.append(Entry(solver, evaluation.measure(solver)))
        return evaluation, entries

    def _real(self, prompts: Sequence[str]) -> Tensor | None:
        return true_images(prompts, self.seed) if self.model == SHAPES else None

    def _features(self, evaluation: Evaluation, real: Tensor, prompts: Sequence[str]) -> Tensor:
        return evaluation.features(real, {"true images of": list(prompts), "seed": self.seed})


def _refuse_prompts(model: str, reward: Path | None, files: Mapping[str, Path | None]) -> None:
    """Raise InputError where an unconditional model is given prompts, by the option, or no reward that needs none."""
    for option, file in files.items():
        if file is not None:
            raise InputError(f"{option} {file}: {model} is unconditional and takes no prompt: leave it out")
    if reward is None:
        raise InputError(
            f"--reward is missing: {model} is unconditional, so name one that looks at the image alone: aesthetic, or "
            "a function of yours, my_module:my_reward"
        )


def _listed(text: str, option: str) -> list[str]:
    """The distinct parts of a list with commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r}: an entry is empty; separate names by single commas")
    return list(dict.fromkeys(parts))


def _budgets(text: str) -> list[int]:
    parts = _listed(text, "--nfe")
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= 1000 for part in parts):
        raise InputError(f"--nfe {text!r}: write numbers of evaluations from 1 to 1000, for example 4,6,8")
    return sorted({int(part) for part in parts})


def _scales(text: str) -> list[float]:
    try:
        scales = [float(part) for part in _listed(text, "--guidances")]
    except ValueError:
        raise InputError(f"--guidances {text!r}: write numbers, for example 1.5,3,7.5") from None
    if not all(0 <= scale < float("inf") for scale in scales):
        raise InputError(f"--guidances {text!r}: every scale must be at least 0 and finite")
    return scales


def _predictors(
    model: str, options: ModelOptions, sources: Sequence[str], root: Path, budgets: Sequence[int]
) -> list[Solver]:
    """The tables that were asked for, or all that lie in `root` and were made for the model and a wanted budget."""
    found = [load_solver(source, root) for source in sources] if sources else list(_discovered(model, root))
    fitting = []
    for solver in found:
        parallel = solver.evaluations.parallel
        if parallel in budgets:
            fitting.append(solver)
        elif sources:
            raise InputError(f"{solver.where}: takes {parallel} parallel evaluations; add {parallel} to --nfe")
        else:
            click.echo(f"left out: {solver.where} takes {parallel} parallel evaluations")
    for solver in fitting:
        if solver.model != model:
            click.echo(f"{solver.where} was made for {solver.model}, not for {model}")
        if solver.model_options.changes() != options.changes():
            click.echo(f"{solver.where}: its model was loaded {solver.model_options}, and here {options}")
    labels = [solver.label for solver in fitting]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"several predictors are called {min(twice)}: choose among them with --predictor_path")
    if not fitting:
        click.echo(f"no predictor for {model} in {root}")
    return fitting


def _discovered(model: str, root: Path) -> Iterator[Solver]:
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        try:
            solver = load_solver(folder, root)
        except InputError as error:
            click.echo(f"left out: {error}")
            continue
        if solver.model == model:
            yield solver


if __name__ == "__main__":
    main()
