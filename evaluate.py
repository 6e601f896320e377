"""Hold solvers and predictors side by side on the same prompts and the same noise."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import torch
from lightning.fabric import Fabric

from benchmarks.evaluation_cost import Cost, Drawn
from errors import InputError, shows_input_errors
from files import only_writer, write_atomically
from models import load_denoiser
from models.assets import machine
from models.devices import DTYPES
from models.inception import RESIZES, inception_file
from models.pictures import to_pixels
from models.registry import SHAPES_WORLD, check_assets
from training.image_folder import ImageRequest, SolverFolders
from training.measuring.comparison import CLASSICAL_BASELINE, TOTAL, Baseline, Comparison, parse_baseline
from training.measuring.evaluation import PREVIEWS, REFERENCE_STEPS, Store, reference_solver
from training.measuring.evaluation_page import evaluation_page
from training.measuring.protocol import Protocol, load_protocol
from training.measuring.real_images import (
    DISTANCES,
    Note,
    RealImages,
    clip_files,
    load_extractors,
    parse_distances,
    say_few_for_fid,
)
from training.measuring.report import Report
from training.measuring.request import SHAPES_REWARD, USUAL_PROMPTS, USUAL_REWARD, EvaluationRequest
from training.networks import Plain
from training.ppo.panels import judges_of, true_images
from training.ppo.rewards import find_reward_files
from training.ppo.scene import Scene
from training.runs.command_line import EitherDash, Finite, require_processes, takes_model_options
from training.runs.fabric import fabric_of
from training.solver import (
    CLASSICAL,
    TRIED_SCHEDULES,
    Schedule,
    Solver,
    network_dtype,
    parse_classical,
    parse_schedule,
)

Found = TypeVar("Found")
Read = TypeVar("Read")

EXAMPLES = """
\b
Examples:
  python evaluate.py --model shapes --solvers epd,ddim,heun,dpm2,dpmpp,ipndm --nfe 4,6,8,12,20
  python evaluate.py --solvers epd,dpmpp,dpmpp:2 --nfe 4,8 --predictor_path 1 --baseline classical --baseline dpmpp@8
  python evaluate.py --nfe 4 --guidances 1.5,2,3,5,7.5 --schedules discrete,polynomial
  python evaluate.py --model sd15 --prompt-file src/prompts/MS-COCO_val2014_30k_captions.csv --number 30000 --pair
      --reference-steps 0 --real coco_val2014_legacy.npz --resize legacy --reward weights/HPS_v2.1_compressed.pt
      --reward clip_score --num-devices 8

Every measurement is kept: the same call again is quick, and one that was stopped goes on.
"""


@shows_input_errors
def _take_protocol(context: click.Context, _: click.Parameter, name: str | None) -> Protocol | None:
    """Let a protocol's options stand in for the command's defaults."""
    if name is None:
        return None
    parameters = {
        option.removeprefix("--"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if option not in ("--protocol", "--dry-run")
    }
    protocol = load_protocol(name, parameters)
    context.default_map = {
        parameters[key].name: values if parameters[key].multiple else ",".join(values)
        for key, value in protocol.options.items()
        for values in [value if isinstance(value, list) else [value]]
    }
    return protocol


def _listed(text: str, option: str) -> list[str]:
    """The distinct parts of a list with commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{option} {text!r}: an entry is empty; separate names by single commas")
    return list(dict.fromkeys(parts))


def _solvers(text: str) -> list[str]:
    names = _listed(text, "--solvers")
    for name in names:
        if name != "epd":
            parse_classical(name)
    return names


def _schedules(text: str) -> list[Schedule]:
    return [parse_schedule(part) for part in _listed(text, "--schedules")]


def _budgets(text: str) -> list[int]:
    parts = _listed(text, "--nfe")
    if not all(re.fullmatch("[0-9]{1,9}", part) and 0 < int(part) <= 1000 for part in parts):
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


def _read_by(read: Callable[[str], Read]) -> Callable[[click.Context, click.Parameter, str | None], Read | None]:
    """A callback by which an option is what `read` makes of its text."""

    @shows_input_errors
    def callback(_: click.Context, __: click.Parameter, text: str | None) -> Read | None:
        return None if text is None else read(text)

    return callback


@click.command(epilog=EXAMPLES, cls=EitherDash, context_settings={"show_default": True})
@click.option(
    "--protocol",
    is_eager=True,
    callback=_take_protocol,
    metavar="NAME",
    help="Take what is not said here from evaluations/NAME.yaml, or from the file of that path, and put the published "
    "figures that it names beside ours.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what it would cost, and which files are missing and how to fetch them; draw nothing.",
)
@click.option("--model", "--model_path", default="shapes", help="Registered name, pipeline folder or file.")
@click.option(
    "--solvers",
    callback=_read_by(_solvers),
    default=",".join(["epd", *CLASSICAL]),
    help="Separated by commas; multistep ones with an order after a colon where not the highest is meant: dpmpp:2.",
)
@click.option(
    "--nfe", callback=_read_by(_budgets), default="4,6,8,12,20", help="Parallel evaluations, before guidance."
)
@click.option(
    "--schedules",
    callback=_read_by(_schedules),
    default=",".join(TRIED_SCHEDULES),
    help="Tried for every classical solver, NAME or NAME:RHO, with @LEVEL from a lower noise level (discrete@5 suits "
    "few evaluations); each metric is reported at the best.",
)
@click.option(
    "--guidances",
    callback=_read_by(_scales),
    help="Constant guidance scales tried for every classical solver, such as 1.5,3,7.5; chosen as schedules are. "
    "[--guidance]",
)
@click.option(
    "--validation-file",
    type=click.Path(path_type=Path),
    help="Prompts on which schedule and guidance are chosen. [shapes: its validation prompts; otherwise those that are "
    "scored, which favours the classical solvers]",
)
@click.option("--validation-number", type=click.IntRange(min=2), default=64, help="How many of them, from the top.")
@click.option(
    "--predictor_path",
    "predictors",
    multiple=True,
    help="EPD table: file, folder or experiment number; may be repeated. [all in --exps that were made for the model]",
)
@click.option("--exps", type=click.Path(path_type=Path), default=Path("exps"), help="Experiments.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    default=(CLASSICAL_BASELINE, f"{CLASSICAL_BASELINE}@{TOTAL}"),
    help="What differences are taken to, may be repeated: classical (the best of them), or a solver's or predictor's "
    "label; at as many parallel evaluations, at those after an @ (classical@8), or at as many in all (@total).",
)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A .txt (one a line), .csv (column `text`) or .json list; may be repeated: a table of their own for each; "
    f"none for an unconditional model. [for {' and '.join(SHAPES_WORLD)}, {USUAL_PROMPTS}]",
)
@click.option("--number", type=click.IntRange(min=2), default=128, help="Prompts of each, from the top; or images.")
@click.option(
    "--pair",
    is_flag=True,
    help="Take the prompts as they stand, repeated ones too: prompt i with seed i, as published numbers are made.",
)
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, help="First noise seed; bootstrap seed.")
@click.option(
    "--guidance",
    type=Finite(min=0),
    help="Guidance scale of the reference and of the classical solvers, a choice: what is best differs by model and by "
    "solver. [the model's own]",
)
@click.option(
    "--reward",
    "reward_paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Preference checkpoint, or pickscore, clip_score, aesthetic, imagereward, mps, or my_module:my_reward; may be "
    "repeated: all in one pass over the images; the first is called the reward. "
    f"[{SHAPES_REWARD} for shapes, otherwise {USUAL_REWARD}]",
)
@click.option(
    "--real",
    "real_path",
    type=click.Path(path_type=Path),
    help="Real images for --distances: a folder of them, or a .npz of scripts.image_statistics or of other FID code.",
)
@click.option(
    "--distances",
    callback=_read_by(parse_distances),
    help=f"To --real, separated by commas: {', '.join(DISTANCES)}. [fid where --real is given]",
)
@click.option(
    "--resize",
    type=click.Choice(RESIZES),
    default="clean",
    help="For FID and KID: clean as clean-fid does, or legacy, by the network, as most published numbers.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(0, 1000),
    default=REFERENCE_STEPS,
    help="Steps of the fine reference that latent and pixel RMS are taken to; 0 for none, which saves its evaluations.",
)
@click.option(
    "--tell",
    type=Finite(min=0, min_open=True),
    help="Say after the first prompts how many it takes to tell such a difference in reward.",
)
@click.option("--images", is_flag=True, help="Write every image to OUTDIR/images, a folder a solver.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, help="Images at once; raise it where the device has the memory."
)
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("outputs/evaluation"))
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("outputs/evaluation-cache"),
    help="Where latents and measurements are kept; latents of Stable Diffusion take 64 kB an image and sampler.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--num-devices",
    type=click.IntRange(min=1),
    default=1,
    help="Devices, each with a process of its own, that share the prompts out; they must share --cache.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the network. [float32; on CUDA half precision]")
@shows_input_errors
@takes_model_options
def main(protocol: Protocol | None, *, dry_run: bool, **told: Any) -> None:
    """Print and save a table of solvers: rewards, verifier, distances to real images and to a fine reference.

    Every prompt has one noise, the same for all solvers. Written to --outdir: report.md, results.csv, results.json,
    metrics.png, for each parallel NFE a sheet of images at each solver's best schedule by reward, and all of it as one
    page, index.html.
    """
    request = EvaluationRequest(protocol=protocol, **told)
    require_processes(request.num_devices)
    request.check_options()
    if dry_run:
        preview(request)
    else:
        compare(request)


def preview(request: EvaluationRequest) -> None:
    """Say what it would cost, and what is missing."""
    missing: list[str] = []

    def there(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except InputError as error:
            missing.append(str(error))
            return None

    there(request.prompts)
    there(request.validation_prompts)
    there(request.check_real_images)
    there(lambda: check_assets(request.model, request.model_options))
    for reward in request.rewards:
        there(lambda reward=reward: find_reward_files(reward))
    for needing, find in (({"fid", "kid"}, inception_file), ({"cmmd"}, clip_files)):
        if needing & set(request.wanted):
            there(find)
    found = there(lambda: request.tables(click.echo))
    tables = found or []
    cost = Cost.of(request.model, request.model_options, DTYPES[request.dtype or "float32"])
    usual = cost.denoiser.default_guidance_scale if request.guidance is None else request.guidance
    rivals = request.rivals(tables, usual, click.echo)
    for text in request.baselines if found is not None else ():
        parse_baseline(text, [*tables, *rivals])
    chosen = list({(solver.label, solver.num_steps): solver for solver in rivals}.values())
    scored = rivals if request.chosen_on is None else chosen
    drawn = [Drawn("scored (at least one setting a metric)", request.count, [*tables, *scored])]
    if request.chosen_on is not None and len(rivals) > len(chosen):
        drawn.append(Drawn("to choose settings on", request.validation_number, rivals))
    if request.reference_steps:
        drawn.append(
            Drawn("reference", request.count, [reference_solver(cost.denoiser, usual, request.reference_steps)])
        )
    features = 1 + len({distance == "cmmd" for distance in request.wanted})
    for line in cost.lines(drawn, features=features, images=request.images, devices=request.num_devices):
        click.echo(line)
    for line in missing or ["every file is there"]:
        click.echo(f"missing: {line}" if missing else line)
    click.echo("dry run: nothing was drawn")


class Contenders(NamedTuple):
    """Who is compared, all fitting the model: predictors, classical solvers at all their settings, and what differences
    are taken to. guidance_scale: of those that have none of their own, and of the reference. dtype: of the network.
    """

    tables: list[Solver]
    rivals: list[Solver]
    baselines: list[Baseline]
    guidance_scale: float
    dtype: torch.dtype


def contenders_of(request: EvaluationRequest, prompts: Sequence[str], device: torch.device, say: Note) -> Contenders:
    """Who is compared by a request. Raises InputError for what does not fit the model, before its weights are read."""
    tables = request.tables(say)
    dtype = network_dtype(request.dtype, request.model, device, tables, say)
    denoiser = check_assets(request.model, request.model_options)
    denoiser.validate_prompts(prompts)
    scale = denoiser.default_guidance_scale if request.guidance is None else request.guidance
    rivals = [rival.on(denoiser) for rival in request.rivals(tables, scale, say)]
    tables = [
        (table.guided(scale) if table.guidance_scale is None and not table.has_guidance_column else table).on(denoiser)
        for table in tables
    ]
    if not tables and not rivals:
        raise InputError(
            "nothing to compare: no solver can spend any of the evaluations of --nfe, and there is no predictor"
        )
    baselines = [parse_baseline(text, [*tables, *rivals]) for text in request.baselines]
    return Contenders(tables, rivals, baselines, scale, dtype)


def scene_of(
    request: EvaluationRequest, contenders: Contenders, prompts: Sequence[str], fabric: Fabric, say: Note
) -> Scene:
    """The model, its judges, and what else stays the same; `prompts` are all that will be judged."""
    denoiser = load_denoiser(request.model, device=fabric.device, dtype=contenders.dtype, options=request.model_options)
    steps = request.reference_steps
    return Scene(
        denoiser=denoiser,
        model=request.model,
        model_options=request.model_options,
        judges=judges_of(request.model, request.rewards, denoiser, prompts, request.batch),
        extractors=load_extractors(request.wanted, request.resize, denoiser.device),
        distances=request.wanted,
        store=Store(request.cache, say),
        reference=reference_solver(denoiser, contenders.guidance_scale, steps) if steps else None,
        seed=request.seed,
        batch=request.batch,
        dtype=torch.promote_types(contenders.dtype, torch.float32),
        fabric=fabric,
        tell=request.tell,
    )


def chosen(request: EvaluationRequest, scene: Scene, rivals: Sequence[Solver], say: Note) -> Comparison | None:
    """Classical solvers on the prompts that their settings are chosen on; None where there is nothing to choose."""
    prompts = request.validation_prompts()
    if prompts is None or len(rivals) == len({(rival.label, rival.num_steps) for rival in rivals}):
        return None
    say(f"{len(rivals)} settings of classical solvers on {len(prompts)} prompts of {request.chosen_on}")
    if shared := request.scored_and_chosen_on():
        say(f"{shared} of these prompts are scored, too, which favours the classical solvers")
    return scene.choose(rivals, prompts)


def image_folders(request: EvaluationRequest, scene: Scene, prompts: Sequence[str], first: Solver) -> SolverFolders:
    """Where every image is written."""
    asked = ImageRequest(
        prompts=prompts,
        seeds=scene.seeds(prompts),
        solver=first,
        model=request.model,
        batch_size=request.batch,
        dtype=scene.dtype,
        paired=True,
        model_options=request.model_options,
    )
    return SolverFolders(request.outdir / "images", asked)


def compare(request: EvaluationRequest) -> None:
    """Draw, judge, and report."""
    for reward in request.rewards:
        find_reward_files(reward)
    request.check_real_images()
    prompts = request.prompts()
    everything = [*prompts, *(request.validation_prompts() or [])]
    fabric = fabric_of(request.device, request.num_devices)
    fabric.launch()
    leads = fabric.is_global_zero
    say = click.echo if leads else lambda _: None
    if not leads:
        logging.disable(logging.WARNING)  # said by the first process
    contenders = contenders_of(request, everything, fabric.device, say)
    if leads:
        click.get_current_context().with_resource(only_writer(request.outdir))
    scene = scene_of(request, contenders, everything, fabric, say)
    real = scene.real_images(request.real_path) if leads and request.real_path is not None else None
    if real is not None and "fid" in request.wanted:
        say_few_for_fid(min(request.count, real.count or request.count), say)
    validation = chosen(request, scene, contenders.rivals, say)
    compared = [*contenders.tables, *(contenders.rivals if validation is None else validation.contenders())]
    beside = "" if scene.reference is None else " and the reference"
    say(f"{len(compared)} solvers{beside} on {request.scored}")
    folders = image_folders(request, scene, prompts, compared[0]) if request.images else None
    evaluation = scene.draw(compared, prompts, folders)
    if not leads:
        return
    comparison, reference = scene.compare(evaluation, compared, validation, real)
    if folders is not None:
        for entry in comparison.entries:
            folders.write_log(entry.solver, (~entry.measured.exploded).tolist())
    say("taking intervals, about a second a solver")
    report = Report(
        comparison=comparison,
        differences=comparison.differences(contenders.baselines),
        reference=reference,
        real=to_pixels(true_images(prompts[:PREVIEWS], request.seed)) if request.model in SHAPES_WORLD else None,
        prompts=prompts,
        groups=request.groups(),
        published=() if request.protocol is None else request.protocol.published,
        settings=settings_of(request, contenders, scene, validation, real),
    )
    files = [*report.write(request.outdir), request.outdir / "index.html"]
    shown = evaluation_page(report, lambda one, rows: evaluation.pixels(one.solver, rows).numpy(), "\n".join(machine()))
    write_atomically(files[-1], shown)
    say(f"\n{report.terminal()}\n")
    say("wrote " + ", ".join(map(str, files[:-1])) + f"; all of it on one page: {files[-1]}")


def settings_of(
    request: EvaluationRequest,
    contenders: Contenders,
    scene: Scene,
    validation: Comparison | None,
    real: RealImages | None,
) -> dict[str, Plain]:
    """How the figures came to be, for the report's head."""
    protocol, last, reference = request.protocol, request.seed - 1, scene.reference
    counted = "none" if real is None else "how many is not said" if real.count is None else f"{real.count:,} images"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        **({} if protocol is None else {"protocol": f"{protocol.name}: {protocol.about}"}),
        "model": f"{request.model}, {request.model_options} (sha256 {scene.model_sha256[:16]})",
        "prompts": f"{request.scored}, seeds {request.seed} to {last + request.count}",
        "guidance": contenders.guidance_scale,
        "reference": "none" if reference is None else f"{reference.label}, from the same noise",
        "rewards": ", ".join(map(str, request.rewards)),
        "Fréchet distance to": scene.frechet_target,
        "real images": "none" if real is None else f"{real.source}, {counted}, {request.resize} resizing",
        "schedules tried": ", ".join(map(str, request.schedules)),
        "guidance scales tried": ", ".join(f"{one:g}" for one in request.scales(contenders.guidance_scale)),
        "chosen on": "these prompts"
        if validation is None
        else f"the first {request.validation_number} of {request.chosen_on}, seeds {request.seed} to "
        f"{last + request.validation_number}; {request.scored_and_chosen_on() or 'none'} of these prompts are scored, "
        "too",
        "predictors": ", ".join(f"{table.label} = {table.where}" for table in contenders.tables) or "none",
        "torch": torch.__version__,
        "device": f"{request.num_devices} x {scene.denoiser.device}, {str(contenders.dtype).removeprefix('torch.')}",
    }


def _commit() -> str:
    """The commit of this code, where it is a checkout, and whether it was changed."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=, and changes since", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git on this machine
        return "no git on this machine"
    return found.stdout.strip() if found.returncode == 0 else "no git checkout"


if __name__ == "__main__":
    main()
