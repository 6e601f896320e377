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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from benchmarks.evaluation_cost import Cost, Drawn
from errors import InputError, shows_input_errors
from files import only_writer, write_atomically
from models import load_denoiser
from models.assets import machine
from models.devices import DTYPES
from models.inception import RESIZES, Resize, inception_file
from models.options import ModelOptions
from models.pictures import to_pixels
from models.prompts import first_prompts
from models.registry import SHAPES_WORLD, check_assets, is_unconditional
from training.image_folder import ImageRequest, SolverFolders
from training.measuring.comparison import CLASSICAL_BASELINE, TOTAL, parse_baseline
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
    real_files,
    say_few_for_fid,
)
from training.measuring.report import Report
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
    classical_solvers,
    load_solver,
    network_dtype,
    parse_classical,
    parse_schedule,
)

SHAPES_REWARD = Path("weights/shapes_reward.pt")
USUAL_PROMPTS = Path("src/prompts/shapes_heldout.csv")
SHAPES_VALIDATION = Path("src/prompts/shapes_validation.csv")
USUAL_REWARD = Path("weights/HPS_v2.1_compressed.pt")

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
    asked = Asked(**told)
    require_processes(asked.num_devices)
    if asked.distances is not None and asked.real_path is None:
        raise InputError("--distances are taken to real images: name them with --real")
    if asked.predictors and "epd" not in asked.solvers:
        raise InputError("--predictor_path is given, but --solvers has no epd: add it")
    if asked.unconditional:
        _refuse_prompts(asked)
    elif asked.model not in SHAPES_WORLD and not asked.prompt_files:
        raise InputError(
            f"--prompt-file is missing: what is {asked.model} to draw? {USUAL_PROMPTS} is taken for the shapes "
            "world alone"
        )
    if dry_run:
        preview(asked)
    else:
        compare(asked, protocol)


@dataclass(frozen=True)
class Asked:
    """What was asked for; each as its option says."""

    model: str
    solvers: list[str]
    nfe: list[int]
    schedules: list[Schedule]
    guidances: list[float] | None
    validation_file: Path | None
    validation_number: int
    predictors: tuple[str, ...]
    exps: Path
    baselines: tuple[str, ...]
    prompt_files: tuple[Path, ...]
    number: int
    pair: bool
    seed: int
    guidance: float | None
    reward_paths: tuple[Path, ...]
    real_path: Path | None
    distances: list[str] | None
    resize: Resize
    reference_steps: int
    tell: float | None
    images: bool
    batch: int
    outdir: Path
    cache: Path
    device: str
    num_devices: int
    dtype: str | None
    model_options: ModelOptions

    @cached_property
    def unconditional(self) -> bool:
        """Whether the model takes no prompts, as far as its files are there to say so."""
        return is_unconditional(self.model)

    @cached_property
    def rewards(self) -> tuple[Path, ...]:
        """Rewards, the first of which is called so."""
        return self.reward_paths or (SHAPES_REWARD if self.model in SHAPES_WORLD else USUAL_REWARD,)

    @cached_property
    def chosen_on(self) -> Path | None:
        """The file of the prompts that settings are chosen on."""
        return self.validation_file or (SHAPES_VALIDATION if self.model in SHAPES_WORLD else None)

    @property
    def wanted(self) -> list[str]:
        """Distances to real images."""
        return [] if self.real_path is None else self.distances or ["fid"]

    @cached_property
    def read_from(self) -> tuple[Path, ...]:
        """The files of the prompts that are scored; none of an unconditional model."""
        return () if self.unconditional else self.prompt_files or (USUAL_PROMPTS,)

    def prompts(self) -> list[str]:
        """The prompts that are scored; of an unconditional model the empty prompt, which every image has."""
        if self.unconditional:
            return [""] * self.number
        return [prompt for file in self.read_from for prompt in first_prompts(file, self.number, repeated=self.pair)]

    @property
    def count(self) -> int:
        """How many prompts are scored."""
        return self.number * (len(self.read_from) or 1)

    @property
    def scored(self) -> str:
        """What is scored, in words."""
        if self.unconditional:
            return f"{self.number} images without a prompt"
        return f"the first {self.number} of {' and of '.join(map(str, self.read_from))}"

    def validation_prompts(self) -> list[str] | None:
        """The prompts that settings are chosen on."""
        return None if self.chosen_on is None else first_prompts(self.chosen_on, self.validation_number)

    def check_real_images(self) -> None:
        """Raise InputError where the real images cannot be used, as far as that is seen without their features."""
        if self.real_path is not None and self.real_path.is_dir():
            real_files(self.real_path)
        elif self.real_path is not None:
            RealImages.load(self.real_path, f" --distances {','.join(self.wanted)} --resize {self.resize}")

    def scales(self, usual: float) -> list[float]:
        """Guidance scales that are tried."""
        return [usual] if self.guidances is None else self.guidances

    def rivals(self, tables: Sequence[Solver], usual: float, say: Note) -> list[Solver]:
        """The classical solvers at all their settings, at as many evaluations as the tables have in all too."""
        budgets = set(self.nfe)
        if any(baseline.endswith(f"@{TOTAL}") for baseline in self.baselines):
            budgets |= {table.evaluations.total for table in tables}
        classical = [name for name in self.solvers if name != "epd"]
        solvers = classical_solvers(classical, sorted(budgets), self.schedules, note=say)
        return [solver.guided(scale) for solver in solvers for scale in self.scales(usual)]

    def tables(self, say: Note) -> list[Solver]:
        """The predictors that were asked for, or all in `exps` that were made for the model and a wanted budget."""
        if "epd" not in self.solvers:
            return []
        left: list[str] = []
        fitting = []
        for solver in [load_solver(path, self.exps) for path in self.predictors] or self._discovered(left):
            parallel = solver.evaluations.parallel
            if parallel in self.nfe:
                fitting.append(solver)
            elif self.predictors:
                raise InputError(f"{solver.where}: takes {parallel} parallel evaluations; add {parallel} to --nfe")
            else:
                left.append(f"{solver.label} (takes {parallel} parallel evaluations)")
        if left:
            say(f"left out in {self.exps}: {', '.join(left)}")
        for solver in fitting:
            if solver.model != self.model:
                say(f"{solver.where} was made for {solver.model}, not for {self.model}")
            if solver.model_options.changes() != self.model_options.changes():
                say(f"{solver.where}: its model was loaded {solver.model_options}, and here {self.model_options}")
        labels = [solver.label for solver in fitting]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise InputError(f"several predictors are called {min(twice)}: choose among them with --predictor_path")
        if not fitting:
            say(f"no predictor for {self.model} in {self.exps}")
        return fitting

    def _discovered(self, left: list[str]) -> Iterator[Solver]:
        for folder in sorted(path for path in self.exps.glob("*") if path.is_dir()):
            try:
                solver = load_solver(folder, self.exps)
            except InputError:  # which --predictor_path says
                left.append(f"{folder.name} (no table that can be read)")
                continue
            if solver.model == self.model:
                yield solver


def preview(asked: Asked) -> None:
    """Say what it would cost, and what is missing."""
    missing: list[str] = []

    def there(find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except InputError as error:
            missing.append(str(error))
            return None

    there(asked.prompts)
    there(asked.validation_prompts)
    there(asked.check_real_images)
    there(lambda: check_assets(asked.model, asked.model_options))
    for reward in asked.rewards:
        there(lambda reward=reward: find_reward_files(reward))
    for needing, find in (({"fid", "kid"}, inception_file), ({"cmmd"}, clip_files)):
        if needing & set(asked.wanted):
            there(find)
    found = there(lambda: asked.tables(click.echo))
    tables = found or []
    cost = Cost.of(asked.model, asked.model_options, DTYPES[asked.dtype or "float32"])
    usual = cost.denoiser.default_guidance_scale if asked.guidance is None else asked.guidance
    rivals = asked.rivals(tables, usual, click.echo)
    for text in asked.baselines if found is not None else ():
        parse_baseline(text, [*tables, *rivals])
    chosen = list({(solver.label, solver.num_steps): solver for solver in rivals}.values())
    scored = rivals if asked.chosen_on is None else chosen
    drawn = [Drawn("scored (at least one setting a metric)", asked.count, [*tables, *scored])]
    if asked.chosen_on is not None and len(rivals) > len(chosen):
        drawn.append(Drawn("to choose settings on", asked.validation_number, rivals))
    if asked.reference_steps:
        drawn.append(Drawn("reference", asked.count, [reference_solver(cost.denoiser, usual, asked.reference_steps)]))
    features = 1 + len({distance == "cmmd" for distance in asked.wanted})
    for line in cost.lines(drawn, features=features, images=asked.images, devices=asked.num_devices):
        click.echo(line)
    for line in missing or ["every file is there"]:
        click.echo(f"missing: {line}" if missing else line)
    click.echo("dry run: nothing was drawn")


def compare(asked: Asked, protocol: Protocol | None) -> None:
    """Draw, judge, and report."""
    for reward in asked.rewards:
        find_reward_files(reward)
    asked.check_real_images()
    prompts, validation_prompts = asked.prompts(), asked.validation_prompts()

    fabric = fabric_of(asked.device, asked.num_devices)
    fabric.launch()
    say = click.echo if fabric.is_global_zero else lambda _: None
    if not fabric.is_global_zero:
        logging.disable(logging.WARNING)  # said by the first process
    tables = asked.tables(say)
    number_type = network_dtype(asked.dtype, asked.model, fabric.device, tables, say)
    denoiser = check_assets(asked.model, asked.model_options)  # without weights: what does not fit is said before
    everything = [*prompts, *(validation_prompts or [])]
    denoiser.validate_prompts(everything)
    scale = denoiser.default_guidance_scale if asked.guidance is None else asked.guidance
    rivals = [rival.on(denoiser) for rival in asked.rivals(tables, scale, say)]
    tables = [
        (table.guided(scale) if table.guidance_scale is None and not table.has_guidance_column else table).on(denoiser)
        for table in tables
    ]
    if not tables and not rivals:
        raise InputError(
            "nothing to compare: no solver can spend any of the evaluations of --nfe, and there is no predictor"
        )
    baselines = [parse_baseline(text, [*tables, *rivals]) for text in asked.baselines]
    denoiser = load_denoiser(asked.model, device=fabric.device, dtype=number_type, options=asked.model_options)

    if fabric.is_global_zero:
        click.get_current_context().with_resource(only_writer(asked.outdir))
    scene = Scene(
        denoiser=denoiser,
        model=asked.model,
        model_options=asked.model_options,
        judges=judges_of(asked.model, asked.rewards, denoiser, everything, asked.batch),
        extractors=load_extractors(asked.wanted, asked.resize, denoiser.device),
        distances=asked.wanted,
        store=Store(asked.cache, say),
        reference=reference_solver(denoiser, scale, asked.reference_steps) if asked.reference_steps else None,
        seed=asked.seed,
        batch=asked.batch,
        dtype=torch.promote_types(number_type, torch.float32),
        fabric=fabric,
        tell=asked.tell,
    )
    real = scene.real_images(asked.real_path) if fabric.is_global_zero and asked.real_path is not None else None
    if real is not None and "fid" in asked.wanted:
        say_few_for_fid(min(asked.count, real.count or asked.count), say)
    validation, shared = None, len(set(prompts).intersection(validation_prompts or []))
    if validation_prompts is not None and len(rivals) > len({(one.label, one.num_steps) for one in rivals}):
        say(f"{len(rivals)} settings of classical solvers on {len(validation_prompts)} prompts of {asked.chosen_on}")
        if shared:
            say(f"{shared} of these prompts are scored, too, which favours the classical solvers")
        validation = scene.choose(rivals, validation_prompts)
        rivals = validation.contenders()
    compared = [*tables, *rivals]
    beside = "" if scene.reference is None else " and the reference"
    say(f"{len(compared)} solvers{beside} on {asked.scored}")
    request = ImageRequest(
        prompts=prompts,
        seeds=scene.seeds(prompts),
        solver=compared[0],
        model=asked.model,
        batch_size=asked.batch,
        dtype=scene.dtype,
        paired=True,
        model_options=asked.model_options,
    )
    folders = SolverFolders(asked.outdir / "images", request) if asked.images else None
    evaluation = scene.draw(compared, prompts, folders)
    if not fabric.is_global_zero:
        return
    comparison, reference = scene.compare(evaluation, compared, validation, real)
    if folders is not None:
        for entry in comparison.entries:
            folders.write_log(entry.solver, (~entry.measured.exploded).tolist())
    say("taking intervals, about a second a solver")
    last = asked.seed - 1
    report = Report(
        comparison=comparison,
        differences=comparison.differences(baselines),
        reference=reference,
        real=to_pixels(true_images(prompts[:PREVIEWS], asked.seed)) if asked.model in SHAPES_WORLD else None,
        prompts=prompts,
        groups={
            name: slice(number * asked.number, (number + 1) * asked.number)
            for number, name in enumerate(_short_names(asked.read_from))
        },
        published=() if protocol is None else protocol.published,
        settings={
            "command": shlex.join(["python", *sys.argv]),
            "commit": _commit(),
            **({} if protocol is None else {"protocol": f"{protocol.name}: {protocol.about}"}),
            "model": f"{asked.model}, {asked.model_options} (sha256 {scene.model_sha256[:16]})",
            "prompts": f"{asked.scored}, seeds {asked.seed} to {last + asked.count}",
            "guidance": scale,
            "reference": "none" if reference is None else f"{reference.solver.label}, from the same noise",
            "rewards": ", ".join(map(str, asked.rewards)),
            "Fréchet distance to": scene.frechet_target,
            "real images": "none"
            if real is None
            else f"{real.source}, {_counted(real.count)}, {asked.resize} resizing",
            "schedules tried": ", ".join(map(str, asked.schedules)),
            "guidance scales tried": ", ".join(f"{one:g}" for one in asked.scales(scale)),
            "chosen on": "these prompts"
            if validation is None
            else f"the first {asked.validation_number} of {asked.chosen_on}, seeds {asked.seed} to "
            f"{last + asked.validation_number}; {shared or 'none'} of these prompts are scored, too",
            "predictors": ", ".join(f"{table.label} = {table.where}" for table in tables) or "none",
            "torch": torch.__version__,
            "device": f"{asked.num_devices} x {denoiser.device}, {str(number_type).removeprefix('torch.')}",
        },
    )
    files = [*report.write(asked.outdir), asked.outdir / "index.html"]
    shown = evaluation_page(report, lambda one, rows: evaluation.pixels(one.solver, rows).numpy(), "\n".join(machine()))
    write_atomically(files[-1], shown)
    say(f"\n{report.terminal()}\n")
    say("wrote " + ", ".join(map(str, files[:-1])) + f"; all of it on one page: {files[-1]}")


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


def _refuse_prompts(asked: Asked) -> None:
    """Raise InputError where an unconditional model is given prompts, or no reward that needs none."""
    given = {"--prompt-file": asked.prompt_files, "--validation-file": (asked.validation_file,)}
    for option, files in given.items():
        for file in filter(None, files):
            raise InputError(f"{option} {file}: {asked.model} is unconditional and takes no prompt: leave it out")
    if not asked.reward_paths:
        raise InputError(
            f"--reward is missing: {asked.model} is unconditional, so name one that looks at the image alone: "
            "aesthetic, or a function of yours, my_module:my_reward"
        )


def _counted(count: int | None) -> str:
    return "how many is not said" if count is None else f"{count:,} images"


def _short_names(files: Sequence[Path]) -> list[str]:
    """What files are called where they stand side by side: by their whole paths where two have one name."""
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


if __name__ == "__main__":
    main()
