"""What a tuning study found: tables scored on held-out prompts, paired differences, and how fast each arm learned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from benchmarks.tuning_runs import PlannedRun, Study
from errors import InputError
from models.devices import DTYPES
from models.fingerprints import model_fingerprint
from models.prompts import first_prompts, read_prompts
from models.registry import load_denoiser
from solvers import NetworkEvaluations
from training.measuring.comparison import Entry
from training.measuring.evaluation import PREVIEWS, Evaluation, Setting, Store
from training.measuring.statistics import Interval, bootstrap_indices, paired_difference_interval
from training.ppo.assembly import guidance_scale, model_spec
from training.ppo.config import model_options
from training.ppo.export_epd_predictor import read_export, write_export
from training.ppo.panels import judges_of
from training.ppo.scene import draw_together
from training.runs.checkpoint import best_path, newest_checkpoint
from training.runs.run_folder import RunFolder, read_metrics
from training.solver import Solver, classical_solvers, load_solver, parse_schedule

FINAL, BEST = "final", "best"
TABLES: Mapping[str, str] = {
    FINAL: "the mean table after the last step",
    BEST: "the mean table that the watch found best on its own prompts, the starting table where none was better",
}
METRICS: Mapping[str, str] = {"reward": "preference reward", "verifier": "verifier score"}
OVER_PROMPTS, OVER_BOTH = "prompts", "seeds and prompts"
BUDGETS: Mapping[str, Callable[[NetworkEvaluations], int]] = {
    "as many in sequence": lambda spent: spent.parallel,
    "as many in all": lambda spent: spent.total,
    "twice as many in all": lambda spent: 2 * spent.total,
}
"""What a classical solver may spend beside a table: evaluations, of which it makes all in sequence."""


@dataclass(frozen=True)
class Finished:
    """A finished run with its tables as files: each is what anybody would load."""

    run: PlannedRun
    folder: RunFolder
    tables: Mapping[str, Solver]

    @property
    def start(self) -> Solver:
        """The solver that it started from: its table at its own noise levels, which the run may have moved."""
        return self.run.start.solver

    @property
    def start_name(self) -> str:
        """The label of the file that it started from."""
        return self.run.start.snapshot.label


@dataclass(frozen=True, eq=False)
class Group:
    """The finished runs of one arm from one start, with what was measured; one run a seed."""

    arm: str
    start_name: str
    runs: Sequence[Finished]
    start: Entry
    tables: Mapping[str, Sequence[Entry]]
    classical: Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class Line:
    """One paired difference.

    Attributes:
        arm, start: which runs.
        parallel, total: evaluations of an image by the table, before guidance.
        table: `final` or `best`.
        metric: of `METRICS`.
        budget: None against the starting table; of `BUDGETS` against the best classical solver (by this metric).
        baseline: what the difference is taken to, with its evaluations in all, `baseline_total`.
        seed: of the run; None for the mean over all seeds.
        over: what the interval's bootstrap draws.
        value, baseline_value: means over the prompts.
        difference: their paired difference with a 95% interval.
    """

    arm: str
    start: str
    parallel: int
    total: int
    table: str
    metric: str
    budget: str | None
    baseline: str
    baseline_total: int
    seed: int | None
    over: str
    value: float
    baseline_value: float
    difference: Interval


@dataclass(frozen=True)
class Learning:
    """How an arm learned from one start, by the watch of its runs.

    Attributes:
        images: of each run in all.
        target: the gain that is waited for; None where no arm gained.
        images_to_target: of each seed, None where it was not reached.
        plateau: mean gain over the last evaluations, mean over the seeds.
        scatter: standard deviation over these evaluations inside a run, root mean square over the seeds.
        between_seeds: standard deviation of the seeds' plateaus; None for one seed.
        within, between: variance of the rewards inside the groups and between their means, mean over all steps.
    """

    arm: str
    start: str
    images: int
    target: float | None
    images_to_target: Sequence[int | None]
    plateau: float
    scatter: float
    between_seeds: float | None
    within: float
    between: float

    @property
    def median_images(self) -> float:
        """Median over the seeds of the images to the target; infinite where most did not reach it."""
        return statistics.median(float("inf") if count is None else count for count in self.images_to_target)


@dataclass(frozen=True)
class Watched:
    """The evaluations of a run's watch: images so far, held-out reward, and its gain over the starting table."""

    images: Sequence[int]
    reward: Sequence[float]
    gain: Sequence[float]


def finish(run: PlannedRun, folder: RunFolder) -> Finished:
    """Export a finished run's tables.

    Raises:
        InputError: they cannot be exported.
    """
    final = _exported(folder, newest_checkpoint(folder.checkpoints))
    best = best_path(folder.checkpoints)
    best_table = _exported(folder, best) if best.exists() else run.start.solver
    return Finished(run, folder, {FINAL: final, BEST: best_table})


def _exported(folder: RunFolder, checkpoint: Path) -> Solver:
    return load_solver(write_export(folder, read_export(checkpoint, torch.device("cpu")), manifest=True)[0])


def heldout_prompts(study: Study, runs: Sequence[PlannedRun]) -> list[str]:
    """The prompts that the tables are scored on.

    Raises:
        InputError: there are too few, or a run trains on them or watches them.
    """
    prompts = first_prompts(Path(study.heldout_prompts), study.heldout_count)
    for path in sorted({path for run in runs for path in _seen(run)}):
        if shared := set(prompts) & set(read_prompts(path)):
            raise InputError(
                f"{study.heldout_prompts}: {len(shared)} of its prompts also stand in {path}, for example "
                f"{min(shared)!r}: a study is scored on prompts that no run has seen"
            )
    return prompts


def _seen(run: PlannedRun) -> Iterator[str]:
    config = run.start.config
    yield config.data.prompt_csv
    if config.logging.eval_prompts is not None:
        yield config.logging.eval_prompts


class Scorer:
    """Measures tables and classical solvers on the held-out prompts, one noise for each; what it did before is kept."""

    def __init__(
        self,
        study: Study,
        runs: Sequence[PlannedRun],
        fabric: Fabric,
        store: Store,
        bar: tqdm,
    ) -> None:
        """Load the model and the judges. `bar` is told of network evaluations: of how many latents.

        Raises:
            InputError: an asset is missing, or the prompts cannot be used.
        """
        config = runs[0].start.config  # the runs agree in all that is used of it
        spec, options = model_spec(config), model_options(config)
        dtype = DTYPES[config.model.dtype]
        prompts = heldout_prompts(study, runs)
        self._denoiser = load_denoiser(spec, device=fabric.device, dtype=dtype, options=options)
        self._denoiser.validate_prompts(prompts)
        setting = Setting(
            prompts=prompts,
            seeds=[study.heldout_seed + index for index in range(len(prompts))],
            model_fingerprint=model_fingerprint(spec, options),
            batch_size=study.batch,
            dtype=torch.promote_types(dtype, torch.float32),
            previews=PREVIEWS,
        )
        judges = judges_of(spec, [Path(config.reward.weights_path)], self._denoiser, prompts, study.batch)
        self._evaluation = Evaluation(
            self._denoiser, judges, setting, store, bar.update, reference=None, processes=fabric.world_size
        )
        self._study, self._guidance_scale = study, guidance_scale(config)
        self._fabric, self._bar = fabric, bar

    def on_model(self, solver: Solver) -> Solver:
        """The solver, settled for the model of the study."""
        return solver.on(self._denoiser)

    def classical(self, nfe: int) -> list[Solver]:
        """Every classical solver that can spend so many parallel evaluations, at every schedule and guidance."""
        schedules = [parse_schedule(text) for text in self._study.schedules]
        solvers = classical_solvers(self._study.solvers, [nfe], schedules, note=click.echo)
        if not solvers:
            raise InputError(f"no solver of the study can spend {nfe} parallel evaluations: add ddim to its solvers")
        scales = self._study.guidances or [self._guidance_scale]
        return [self.on_model(solver.guided(scale)) for solver in solvers for scale in scales]

    def draw(self, solvers: Sequence[Solver]) -> None:
        """Draw and judge solvers on the held-out prompts, shared out over the processes; all of it is kept."""
        draw_together(self._evaluation, solvers, self._fabric, self._bar)

    def measure(self, solver: Solver) -> Entry:
        """What the solver does on the held-out prompts."""
        return Entry(solver, self._evaluation.measure(solver))


def measure(finished: Sequence[Finished], scorer: Scorer) -> list[Group]:
    """Measure all tables and what they are compared with."""
    budgets = {nfe for one in finished for nfe in budgets_of(one.start.evaluations).values()}
    classical = {nfe: scorer.classical(nfe) for nfe in sorted(budgets)}
    starts = {one.run.name: scorer.on_model(one.start) for one in finished}
    tables = {(one.run.name, name): scorer.on_model(table) for one in finished for name, table in one.tables.items()}
    all_classical = [solver for solvers in classical.values() for solver in solvers]
    scorer.draw([*starts.values(), *tables.values(), *all_classical])
    measured_starts = {run: scorer.measure(solver) for run, solver in starts.items()}
    measured_tables = {key: scorer.measure(solver) for key, solver in tables.items()}
    rivals = {nfe: [scorer.measure(solver) for solver in solvers] for nfe, solvers in classical.items()}
    groups: dict[tuple[str, str], list[Finished]] = {}
    for one in finished:
        groups.setdefault((one.run.arm, one.start_name), []).append(one)
    return [
        Group(
            arm,
            start,
            runs,
            measured_starts[runs[0].run.name],
            {name: [measured_tables[one.run.name, name] for one in runs] for name in TABLES},
            {budget: rivals[nfe] for budget, nfe in budgets_of(runs[0].start.evaluations).items()},
        )
        for (arm, start), runs in groups.items()
    ]


def budgets_of(spent: NetworkEvaluations) -> dict[str, int]:
    """What a classical solver may spend beside a table that spends so much; where two are the same, the latter."""
    by_number = {of(spent): budget for budget, of in BUDGETS.items()}
    return {budget: nfe for nfe, budget in by_number.items()}


def lines_of(group: Group) -> Iterator[Line]:
    """Every paired difference of a group: tables, metrics, baselines, seeds one by one and together."""
    for table, entries in group.tables.items():
        for metric in METRICS:
            if metric not in group.start.measured.values:
                continue
            yield from _against(group, table, entries, metric, None, group.start)
            for budget, rivals in group.classical.items():
                yield from _against(group, table, entries, metric, budget, _best(rivals, metric))


def _best(entries: Sequence[Entry], metric: str) -> Entry:
    """The entry with the highest mean; of every metric here more is better."""
    return max(entries, key=lambda entry: entry.measured.values[metric].mean().item())


def _against(
    group: Group, table: str, entries: Sequence[Entry], metric: str, budget: str | None, baseline: Entry
) -> Iterator[Line]:
    ours = torch.stack([entry.measured.values[metric] for entry in entries])  # [R, N]
    theirs = baseline.measured.values[metric]  # [N]
    seeds = [one.run.seed for one in group.runs]
    spent, rival = entries[0].solver.evaluations, baseline.solver
    scale = "" if rival.guidance_scale is None else f" g{rival.guidance_scale:g}"
    name = group.start_name if budget is None else f"{rival.label}, {rival.grid_name}{scale}"
    for seed, over, difference in paired_differences(ours, theirs, seeds):
        yield Line(
            arm=group.arm,
            start=group.start_name,
            parallel=spent.parallel,
            total=spent.total,
            table=table,
            metric=metric,
            budget=budget,
            baseline=name,
            baseline_total=rival.evaluations.total,
            seed=seed,
            over=over,
            value=(ours.mean() if seed is None else ours[seeds.index(seed)].mean()).item(),
            baseline_value=theirs.mean().item(),
            difference=difference,
        )


def paired_differences(
    values: Tensor, baseline: Tensor, seeds: Sequence[int]
) -> Iterator[tuple[int | None, str, Interval]]:
    """The runs' differences to a baseline, each for itself and, where there are several, their mean.

    Args:
        values: [R, N], a row a run; column i of all rows, and of `baseline` [N], has the same prompt and noise.
        seeds: R, of the runs.

    Yields:
        Seed (None for the mean), what the bootstrap draws, the interval. Over prompts it holds for these very runs;
        over seeds and prompts also for other seeds of the run, as far as so few can tell.
    """
    indices = bootstrap_indices(len(baseline), torch.Generator().manual_seed(0))
    for seed, row in zip(seeds, values, strict=True):
        yield seed, OVER_PROMPTS, paired_difference_interval(row, baseline, indices)
    if len(seeds) > 1:
        yield None, OVER_PROMPTS, paired_difference_interval(values.double().mean(0), baseline, indices)
        yield None, OVER_BOTH, crossed_interval(values.double() - baseline.double(), indices)


def crossed_interval(values: Tensor, indices: Tensor) -> Interval:
    """95% interval of the mean of `values` [R, N] where both runs and prompts were drawn from many.

    The bootstrap draws R rows and, independently, N columns, with replacement, and takes the mean over the pairs of
    both (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). `indices` [B, N] are the columns.
    Few rows make such an interval too narrow rather than too wide.
    """
    means = torch.stack([row[indices].mean(1) for row in values], dim=1)  # [B, R], of each run over the drawn prompts
    drawn = torch.randint(len(values), means.shape, generator=torch.Generator().manual_seed(1))
    replicates = means.gather(1, drawn).mean(1)  # [B]
    low, high = replicates.quantile(torch.tensor([0.025, 0.975], dtype=replicates.dtype)).tolist()
    return Interval(values.mean().item(), low, high)


def watched(one: Finished) -> Watched:
    """What the watch of a run saw."""
    rows = [row for row in read_metrics(one.folder.metrics) if "heldout/reward" in row]
    batch = one.run.start.config.ppo.rollout_batch_size
    return Watched(
        [row["step"] * batch for row in rows],
        [row["heldout/reward"] for row in rows],
        [row["heldout/reward_difference"] for row in rows],
    )


def learning_of(groups: Sequence[Group], study: Study) -> list[Learning]:
    """How fast and how far each arm came; the gain that is waited for is the same for all arms of one start."""
    views = [[watched(one) for one in group.runs] for group in groups]
    plateaus = [[_last(view, study.plateau) for view in seen] for seen in views]  # [group][run][evaluation]
    heights = [statistics.fmean(map(statistics.fmean, runs)) for runs in plateaus]
    found = []
    for group, seen, runs, height in zip(groups, views, plateaus, heights, strict=True):
        rivals = [other for other, at in zip(heights, groups, strict=True) if at.start_name == group.start_name]
        target = study.gain_share * max(rivals) if max(rivals) > 0 else None
        means = [statistics.fmean(run) for run in runs]
        within, between = _variances(group.runs)
        found.append(
            Learning(
                arm=group.arm,
                start=group.start_name,
                images=group.runs[0].run.images,
                target=target,
                images_to_target=[None if target is None else images_to(view, target) for view in seen],
                plateau=height,
                scatter=statistics.fmean(statistics.variance(run) for run in runs) ** 0.5,
                between_seeds=statistics.stdev(means) if len(means) > 1 else None,
                within=within,
                between=between,
            )
        )
    return found


def images_to(view: Watched, target: float) -> int | None:
    """Images at the first evaluation that gained the target; None where there is none."""
    return next((count for count, gain in zip(view.images, view.gain, strict=True) if gain >= target), None)


def _last(view: Watched, number: int) -> Sequence[float]:
    """The last gains, that of the starting table left out; a planned run has two at least."""
    return view.gain[1:][-number:]


def _variances(runs: Sequence[Finished]) -> tuple[float, float]:
    rows = [row for one in runs for row in read_metrics(one.folder.metrics) if "reward_within_variance" in row]
    return (
        statistics.fmean(row["reward_within_variance"] for row in rows),
        statistics.fmean(row["reward_between_variance"] for row in rows),
    )
