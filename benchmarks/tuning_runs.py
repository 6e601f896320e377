"""The runs of a tuning study: what its file says, which runs that makes, and how they are carried out one by one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from subprocess import TimeoutExpired

from errors import InputError
from interrupts import Interrupted, Interrupts
from models.asset_table import ROOT
from models.options import ModelOptions
from training.ppo.assembly import Start, prepare
from training.ppo.config import Config, load_config
from training.runs.checkpoint import NAME as CHECKPOINT_NAME
from training.runs.checkpoint import list_checkpoints
from training.runs.configuration import Disagreements, Schema, knob, to_plain
from training.runs.run_folder import RunFolder
from training.solver import CLASSICAL, TRIED_SCHEDULES, load_solver, parse_classical, parse_schedule

COMMAND = "training.ppo.launch"
"""The module that carries out a run."""

SHOWN_LINES = 5  # of the log of a run that failed


@dataclass
class Arm:
    """One way to tune tables; a run for each of its starts and seeds.

    Attributes:
        config: the runs' configuration file, as for `training.ppo.launch`.
        overrides: its overrides, `section.key=value`; `search.method=cma_es` for another search than PPO.
        seeds: run.seed of each run.
        starts: data.predictor_snapshot of each run: a snapshot, its folder, or an experiment number in exps/.
    """

    config: str = ""
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)


@dataclass
class Study:
    """A study file."""

    arms: dict[str, Arm] = knob({}, "name -> config, overrides, seeds, starts", required=True)  # noqa: RUF009
    heldout_prompts: str = knob("src/prompts/shapes_heldout.csv", "prompts that no run and no watch has seen")
    heldout_count: int = knob(512, "held-out images of each table: prompts from the top, one image each", at_least=2)
    heldout_seed: int = knob(0, "seed of the first held-out image; the next has the next seed", at_least=0, below=2**62)
    batch: int = knob(32, "held-out images made at once", at_least=1)
    solvers: list[str] = knob([*CLASSICAL], "classical solvers that the tables are compared with")  # noqa: RUF009
    schedules: list[str] = knob(  # noqa: RUF009
        [*TRIED_SCHEDULES],
        "schedules that each classical solver is tried at; it is reported at the best for each metric",
    )
    guidances: list[float] = knob(  # noqa: RUF009
        [], "constant guidance scales that each is tried at likewise; none: the runs' own alone"
    )
    gain_share: float = knob(
        0.9, "images are counted until this share of the best arm's plateau is gained", above=0, at_most=1
    )
    plateau: int = knob(4, "the plateau is the mean of this many last evaluations of a run's watch", at_least=2)


def _disagreements(study: Study) -> Disagreements:
    """What is wrong with the arms, and with solvers and schedules by name."""
    for name, arm in study.arms.items():
        yield from (({"arms"}, f"arms.{name}{fault}") for fault in _arm_faults(name, arm))
    for key, names, parse in (
        ("solvers", study.solvers, parse_classical),
        ("schedules", study.schedules, parse_schedule),
    ):
        if not names:
            yield {key}, f"{key} is empty: name at least one"
        for name in names:
            try:
                parse(name)
            except InputError as error:
                yield {key}, f"{key}: {error}"
    if not all(0 <= scale < float("inf") for scale in study.guidances):
        yield {"guidances"}, f"guidances={study.guidances}: every scale must be at least 0 and finite"


def _arm_faults(name: str, arm: Arm) -> Iterator[str]:
    if not re.fullmatch(r"[\w-]+", name):
        yield ": the name becomes a part of folder names: use letters, digits, _ and - only"
    if not arm.config:
        yield ".config is not set"
    for key, values in (("seeds", arm.seeds), ("starts", arm.starts)):
        if not values or len(set(values)) < len(values):
            yield f".{key}={values!r} must name at least one, and none twice"


SCHEMA = Schema(Study, _disagreements, shipped="benchmarks/studies/")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        arm: its arm's name.
        config_path, overrides: what that is told.
        seed: run.seed.
        start: its configuration, settled, and the table that it starts from.
    """

    arm: str
    config_path: str
    overrides: tuple[str, ...]
    seed: int
    start: Start

    @property
    def name(self) -> str:
        """The last part of its folder's name."""
        return self.start.config.run.run_name

    @property
    def steps(self) -> int:
        """How many it has."""
        return self.start.config.ppo.steps

    @property
    def images(self) -> int:
        """How many images it takes in all."""
        return self.steps * self.start.config.ppo.rollout_batch_size


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the folder of one that is finished, or why there is none."""

    run: PlannedRun
    folder: RunFolder | None
    failure: str | None


def plan_runs(study: Study, root: Path) -> list[PlannedRun]:
    """Every run of a study, its configuration checked; their folders are to lie in `root`.

    Raises:
        InputError: a run could not start, its watch would look too seldom, or two would have the same name.
    """
    runs = [
        _planned(name, arm, start, seed, root)
        for name, arm in study.arms.items()
        for start in arm.starts
        for seed in arm.seeds
    ]
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two runs of the study would be called {twice[0]}: their tables lie in folders of one name")
    return runs


def _planned(name: str, arm: Arm, source: str, seed: int, root: Path) -> PlannedRun:
    overrides = (
        *arm.overrides,
        f"data.predictor_snapshot={source}",
        f"run.seed={seed}",
        f"run.output_root={root}",
        f"run.run_name={name}-{load_solver(source).label}-seed{seed}",
    )
    start = prepare(load_config(arm.config, overrides))
    steps, interval = start.config.ppo.steps, start.config.logging.eval_interval
    if not 0 < interval < steps:
        raise InputError(
            f"arms.{name}: logging.eval_interval={interval} of {steps} steps: a plateau needs at least two evaluations "
            f"after the start; set it to {max(1, steps // 10)}"
        )
    return PlannedRun(name, arm.config, overrides, seed, start)


def begun(run: PlannedRun, root: Path) -> RunFolder | None:
    """The newest folder of a run that has a checkpoint.

    Raises:
        InputError: it was made with other settings.
    """
    named = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(run.name)}")
    paths = sorted(path for path in root.glob(f"*-{run.name}") if named.fullmatch(path.name))
    folders = [folder for folder in map(RunFolder, paths) if list_checkpoints(folder.checkpoints)]
    if not folders:
        return None
    changed = _changed(load_config(folders[-1].config).config, run.start.config)
    if changed:
        raise InputError(
            f"{folders[-1].path}: was made with other settings than the study now has ({', '.join(changed)}): "
            f"choose another --output, or move the run away to have it made again"
        )
    return folders[-1]


def _changed(before: Config, now: Config) -> list[str]:
    """Keys that differ, with both values; where and on what a run is made is no difference."""
    old, new = to_plain(before), to_plain(now)
    for plain in (old, new):
        plain["run"] |= {"device": None, "output_root": None}
    return [
        f"{section}.{key}: {old[section][key]!r}, now {value!r}"
        for section, keys in new.items()
        for key, value in keys.items()
        if old[section][key] != value
    ]


def is_finished(run: PlannedRun, folder: RunFolder) -> bool:
    """Whether there is a checkpoint of the last step."""
    match = CHECKPOINT_NAME.fullmatch(list_checkpoints(folder.checkpoints)[-1].name)
    return match is not None and int(match[1]) >= run.steps


def outcome_of(run: PlannedRun, root: Path, failure: str | None = None) -> Outcome:
    """The run's folder, if it is finished, or its failure."""
    folder = begun(run, root)
    return (
        Outcome(run, folder, None) if folder is not None and is_finished(run, folder) else Outcome(run, None, failure)
    )


def carry_out(run: PlannedRun, root: Path, device: str | None, log: Path) -> Outcome:
    """Make a run, or go on with it; one that is finished stays as it is. What the command prints goes to `log`.

    Raises:
        Interrupted: the study was interrupted; the run has saved a checkpoint first.
    """
    if (done := outcome_of(run, root)).folder is not None:
        return done
    folder = begun(run, root)
    if folder is not None:
        told = ["--resume", str(folder.path)]
    else:
        told = ["--config", run.config_path, "--override", *run.overrides]
    code = run_command(COMMAND, [*told, *(["--device", device] if device else [])], log)
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return outcome_of(run, root, f"{run.name} ended with {code}, see {log}: {' / '.join(lines[-SHOWN_LINES:])}")


def run_command(module: str, arguments: Sequence[str], log: Path) -> int:
    """Run `python -m module` as a process of its own and wait for it; returns its exit status.

    A first SIGINT or SIGTERM is handed on to it, so that it can save what it has.

    Raises:
        Interrupted: once it has ended after such a signal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", module, *arguments]
    with log.open("w") as output, Interrupts() as interrupts:
        # In a session of its own, so that the terminal's interrupt reaches it once, from here.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            code = _wait(process, interrupts)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if interrupts.received is not None:
            raise Interrupted(interrupts.received)
    return code


def _wait(process: subprocess.Popen, interrupts: Interrupts) -> int:
    told = False
    while True:
        try:
            return process.wait(timeout=0.2)
        except TimeoutExpired:
            if interrupts.received is not None and not told:
                process.send_signal(interrupts.received)
                told = True


def require_alike(runs: Sequence[PlannedRun]) -> None:
    """Raise InputError where runs differ in model, how it is loaded, guidance or reward: one evaluation judges all."""
    options = tuple(option.name for option in fields(ModelOptions))
    for section, keys in (
        ("model", ("dataset_name", "model_path", "guidance_rate", "dtype", *options)),
        ("reward", ("weights_path",)),
    ):
        for key in keys:
            values = {str(getattr(getattr(run.start.config, section), key)) for run in runs}
            if len(values) > 1:
                raise InputError(
                    f"the runs of a study must agree in {section}.{key}, not {' and '.join(sorted(values))}"
                )
