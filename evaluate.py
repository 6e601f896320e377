"""Hold solvers and predictors side by side on the same prompts and the same noise."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from errors import InputError, shows_input_errors
from models import Denoiser, clip, load_denoiser
from models.devices import DTYPES, resolve_device, resolve_dtype
from models.fingerprints import fingerprint, model_fingerprint
from models.pictures import to_pixels
from models.prompts import read_prompts
from models.shapes import scenes, verify
from solvers import num_steps_for
from training.command_line import Finite
from training.comparison import CLASSICAL_BASELINE, Comparison, Entry, parse_baseline
from training.evaluation import REFERENCE_GRID, REFERENCE_SOLVER, REFERENCE_STEPS, Evaluation, Panel, Setting, Store
from training.evaluation_report import Report
from training.ppo import rewards
from training.ppo.rewards import find_reward_files, load_reward
from training.sampling import (
    CLASSICAL,
    TRIED_SCHEDULES,
    Grid,
    Plan,
    Predictor,
    classical_plan,
    load_predictor,
    parse_classical,
    parse_grid,
    predictor_plan,
)

SHAPES = "shapes"
SHAPES_REWARD = Path("weights/shapes_reward.pt")
USUAL_REWARD = Path("weights/HPS_v2.1_compressed.pt")
PREVIEWS = 6  # prompts on the sheets

EXAMPLES = """
\b
Examples:
  python evaluate.py --model shapes --solvers epd,ddim,heun,dpm2,dpmpp,ipndm --nfe 4,6,8,12,20
  python evaluate.py --solvers epd,dpmpp,dpmpp:2 --nfe 4,8 --predictor_path 1 --baseline classical --baseline dpmpp@8

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
    default=(CLASSICAL_BASELINE,),
    show_default=True,
    help="What differences are taken to, may be repeated: classical (the best of them), or a solver's or predictor's "
    "label; at as many parallel evaluations, or at those after an @: classical@8.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path),
    default=Path("src/prompts/shapes_heldout.csv"),
    show_default=True,
    help="A .txt (one a line) or .csv (column `text`).",
)
@click.option("--number", type=click.IntRange(min=2), default=128, show_default=True, help="Prompts, from the top.")
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="First noise seed; bootstrap seed."
)
@click.option(
    "--guidance",
    type=Finite(min=0),
    help="Guidance scale, a choice: what is best differs by model and by solver. [the model's own]",
)
@click.option(
    "--reward",
    "reward_path",
    type=click.Path(path_type=Path),
    help="Preference checkpoint, or pickscore, clip_score or aesthetic. "
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
def main(
    model: str,
    solvers: str,
    nfe: str,
    schedules: str,
    predictors: tuple[str, ...],
    exps: Path,
    baselines: tuple[str, ...],
    prompt_file: Path,
    number: int,
    seed: int,
    guidance: float | None,
    reward_path: Path | None,
    batch: int,
    outdir: Path,
    cache: Path,
    device: str,
    dtype: str,
) -> None:
    """Print and save a table of solvers: reward, verifier, Fréchet distance, distance to a 200-step reference.

    Every prompt has one noise, the same for all solvers. Written to --outdir: report.md, results.csv, results.json,
    metrics.png, and for each parallel NFE a sheet of images at each solver's best schedule by reward.
    """
    names, budgets = _listed(solvers, "--solvers"), _budgets(nfe)
    grids = [parse_grid(text) for text in _listed(schedules, "--schedules")]
    classical = [name for name in names if name != "epd"]
    for name in classical:
        parse_classical(name)
    if predictors and "epd" not in names:
        raise InputError("--predictor_path is given, but --solvers has no epd: add it")
    weights = reward_path or (SHAPES_REWARD if model == SHAPES else USUAL_REWARD)
    find_reward_files(weights)
    prompts = first_prompts(prompt_file, number)
    tables = _predictors(model, predictors, exps, budgets) if "epd" in names else []

    number_type = resolve_dtype(dtype)
    denoiser = load_denoiser(model, device=resolve_device(device), dtype=number_type)
    denoiser.validate_prompts(prompts)
    scale = denoiser.default_guidance_scale if guidance is None else guidance
    tables = _with_guidance(tables, scale, explicit=bool(predictors))
    plans = [
        *(predictor_plan(table, denoiser) for table in tables),
        *(plan for name in classical for budget in budgets for plan in classical_plans(name, budget, grids, denoiser)),
    ]
    if not plans:
        raise InputError(
            "nothing to compare: no solver can spend any of the evaluations of --nfe, and there is no predictor"
        )
    chosen_baselines = [parse_baseline(text, list(dict.fromkeys(plan.label for plan in plans))) for text in baselines]

    store = Store(cache, click.echo)
    setting = Setting(
        prompts=prompts,
        seeds=[seed + index for index in range(number)],
        guidance_scale=scale,
        model_fingerprint=model_fingerprint(model),
        batch_size=batch,
        dtype=torch.promote_types(number_type, torch.float32),
        previews=PREVIEWS,
    )
    panel = judging_panel(model, weights, denoiser, batch)
    click.echo(f"{len(plans)} samplers and the reference on {number} prompts of {prompt_file}, guidance {scale:g}")
    with tqdm(unit="evaluation") as bar:
        evaluation = Evaluation(denoiser, panel, setting, store, bar.update, referenced=True)
        bar.reset(total=evaluation.evaluations_ahead(plans))
        bar.set_description("reference")
        reference = evaluation.reference()
        entries = []
        for plan in plans:
            bar.set_description(f"{plan.label} {plan.grid}, NFE {plan.evaluations.parallel}")
            entries.append(Entry(plan, evaluation.measure(plan)))
    real = _true_images(prompts, seed) if model == SHAPES else None
    target = reference.features
    if real is not None:
        target = evaluation.features(real, {"true images of": list(prompts), "seed": seed})
    click.echo("taking intervals, about a second a solver")
    comparison = Comparison(entries, target, store, seed=seed)
    report = Report(
        comparison=comparison,
        differences=comparison.differences(chosen_baselines),
        reference=reference,
        real=None if real is None else to_pixels(real[:PREVIEWS]),
        prompts=prompts,
        settings={
            "command": shlex.join(["python", *sys.argv]),
            "model": f"{model} (sha256 {setting.model_fingerprint[:16]})",
            "prompts": f"the first {number} of {prompt_file}, seeds {seed} to {seed + number - 1}",
            "guidance": scale,
            "reference": f"{REFERENCE_SOLVER}, {REFERENCE_STEPS} steps, schedule {REFERENCE_GRID}, from the same noise",
            "preference model": str(weights),
            "Fréchet distance to": "true images of the same captions" if real is not None else "the reference's images",
            "schedules tried": ", ".join(map(str, grids)),
            "predictors": ", ".join(f"{table.label} = {table.file}" for table in tables) or "none",
            "torch": torch.__version__,
            "device": f"{denoiser.device}, {dtype}",
        },
    )
    files = report.write(outdir)
    click.echo("\n\n".join(["", report.table(), *report.difference_tables(), ""]))
    click.echo("wrote " + ", ".join(map(str, files)))


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


def first_prompts(file: Path, number: int) -> list[str]:
    """The first `number` different prompts of a file. Raises InputError where it has fewer."""
    prompts = list(dict.fromkeys(read_prompts(file)))
    if len(prompts) < number:
        raise InputError(f"{file}: has {len(prompts)} different prompts, --number {number} asks for more")
    return prompts[:number]


def _predictors(model: str, sources: Sequence[str], root: Path, budgets: Sequence[int]) -> list[Predictor]:
    """The tables that were asked for, or all that lie in `root` and were made for the model and a wanted budget."""
    found = [load_predictor(source, root) for source in sources] if sources else list(_discovered(model, root))
    fitting = []
    for predictor in found:
        parallel = predictor.evaluations().parallel
        if parallel in budgets:
            fitting.append(predictor)
        elif sources:
            raise InputError(f"{predictor.file}: takes {parallel} parallel evaluations; add {parallel} to --nfe")
        else:
            click.echo(f"left out: {predictor.file} takes {parallel} parallel evaluations")
    for predictor in fitting:
        if predictor.model != model:
            click.echo(f"{predictor.file} was made for {predictor.model}, not for {model}")
    labels = [predictor.label for predictor in fitting]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise InputError(f"several predictors are called {min(twice)}: choose among them with --predictor_path")
    if not fitting:
        click.echo(f"no predictor for {model} in {root}")
    return fitting


def _discovered(model: str, root: Path) -> list[Predictor]:
    predictors = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        try:
            predictor = load_predictor(folder, root)
        except InputError as error:
            click.echo(f"left out: {error}")
            continue
        if predictor.model == model:
            predictors.append(predictor)
    return predictors


def _with_guidance(predictors: Sequence[Predictor], scale: float, *, explicit: bool) -> list[Predictor]:
    """Those made for this guidance: any other has another reference, to which the distances would mean nothing."""
    kept = []
    for predictor in predictors:
        if predictor.guidance_scale in (None, scale):
            kept.append(predictor)
            continue
        fault = f"{predictor.file}: was made for guidance {predictor.guidance_scale:g}, compared is guidance {scale:g}"
        if explicit:
            raise InputError(f"{fault}; set --guidance {predictor.guidance_scale:g}")
        click.echo(f"left out: {fault}")
    return kept


def classical_plans(name: str, budget: int, grids: Sequence[Grid], denoiser: Denoiser) -> list[Plan]:
    """A classical solver on every grid, with `budget` parallel evaluations; none where it cannot spend so many."""
    solver, _ = parse_classical(name)
    try:
        num_steps = num_steps_for(solver, budget)
    except ValueError as error:
        click.echo(f"left out: {error}")
        return []
    return [classical_plan(name, num_steps, grid, denoiser) for grid in grids]


def judging_panel(model: str, weights: Path, denoiser: Denoiser, batch: int) -> Panel:
    """What judges the images of a model: the reward `weights` and, in the shapes world, the verifier."""
    files = find_reward_files(weights)
    described = [files.weights, files.weights.with_suffix(".json"), files.tokenizer]
    judged_by = [path for path in described if path.exists()]
    judged_by += [Path(clip.__file__), *sorted(Path(rewards.__file__).parent.glob("*.py"))]
    if model == SHAPES:
        judged_by += [Path(scenes.__file__), Path(verify.__file__)]
    reward = load_reward(weights, device=denoiser.device, batch_size=batch)
    return Panel(reward, _verified if model == SHAPES else None, fingerprint(judged_by))


def _verified(image: Tensor, prompt: str) -> dict[str, float]:
    verdict = verify.verify(image, prompt)
    return {"verifier": verdict.score, "verified": float(verdict.correct)}


def _true_images(prompts: Sequence[str], seed: int) -> Tensor:
    """Renderings [N, 3, 64, 64] of the captions, each placed by a generator of its own."""
    placed = enumerate(scenes.parse(prompt) for prompt in prompts)
    return torch.stack([scenes.render(scene, np.random.default_rng([seed, index])) for index, scene in placed])


if __name__ == "__main__":
    main()
