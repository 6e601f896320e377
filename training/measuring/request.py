"""What an evaluation is asked for: prompts, the solvers at their settings, rewards, real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from errors import InputError
from models.inception import Resize
from models.options import ModelOptions
from models.prompts import first_prompts
from models.registry import SHAPES_WORLD, is_unconditional
from training.measuring.comparison import TOTAL
from training.measuring.protocol import Protocol
from training.measuring.real_images import Note, RealImages, real_files
from training.solver import Schedule, Solver, classical_solvers, load_solver

SHAPES_REWARD = Path("weights/shapes_reward.pt")
USUAL_PROMPTS = Path("src/prompts/shapes_heldout.csv")
SHAPES_VALIDATION = Path("src/prompts/shapes_validation.csv")
USUAL_REWARD = Path("weights/HPS_v2.1_compressed.pt")


@dataclass(frozen=True)
class EvaluationRequest:
    """Each entry as the option of `evaluate.py` says."""

    protocol: Protocol | None
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

    def scored_and_chosen_on(self) -> int:
        """How many prompts are among both, so that classical solvers are favoured."""
        return len(set(self.prompts()).intersection(self.validation_prompts() or []))

    def groups(self) -> dict[str, slice]:
        """The prompts of each file; files are called by their whole paths where two have one name."""
        stems = [file.stem for file in self.read_from]
        names = stems if len(set(stems)) == len(stems) else map(str, self.read_from)
        return {name: slice(index * self.number, (index + 1) * self.number) for index, name in enumerate(names)}

    def check_options(self) -> None:
        """Raise InputError where options do not go with each other or with the model."""
        if self.distances is not None and self.real_path is None:
            raise InputError("--distances are taken to real images: name them with --real")
        if self.predictors and "epd" not in self.solvers:
            raise InputError("--predictor_path is given, but --solvers has no epd: add it")
        if self.unconditional:
            self._refuse_prompts()
        elif self.model not in SHAPES_WORLD and not self.prompt_files:
            raise InputError(
                f"--prompt-file is missing: what is {self.model} to draw? {USUAL_PROMPTS} is taken for the shapes "
                "world alone"
            )

    def _refuse_prompts(self) -> None:
        given = {"--prompt-file": self.prompt_files, "--validation-file": (self.validation_file,)}
        for option, files in given.items():
            for file in filter(None, files):
                raise InputError(f"{option} {file}: {self.model} is unconditional and takes no prompt: leave it out")
        if not self.reward_paths:
            raise InputError(
                f"--reward is missing: {self.model} is unconditional, so name one that looks at the image alone: "
                "aesthetic, or a function of yours, my_module:my_reward"
            )

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
