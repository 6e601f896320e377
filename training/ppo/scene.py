"""An evaluation from its solvers and prompts to a comparison: who draws, who judges, and what all is held against."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from models.denoiser import Denoiser
from models.fingerprints import fingerprint, model_fingerprint
from models.options import ModelOptions
from models.registry import SHAPES_WORLD
from training.image_folder import SolverFolders
from training.measuring import distances
from training.measuring.comparison import Comparison, Entry, SetDistance
from training.measuring.distances import paired_frechet_values
from training.measuring.evaluation import PREVIEWS, Evaluation, FeatureJudge, Judge, Setting, Store
from training.measuring.real_images import Extractor, RealImages, folder_features, real_files
from training.measuring.statistics import pairs_needed, tellable_difference
from training.ppo.panels import JUDGES_CODE, true_images
from training.solver import Solver

CODE_OF_DISTANCES = fingerprint([Path(distances.__file__)])
CODE_OF_TRUE_IMAGES = fingerprint(JUDGES_CODE)


@dataclass(frozen=True)
class Scene:
    """What stays the same from one set of prompts to another.

    judges: of every image. extractors: what `distances`, to real images, are taken by. reference: see
    `reference_solver`; None for none. dtype: of the latents. tell: a difference of the reward that is to be told.
    """

    denoiser: Denoiser
    model: str
    model_options: ModelOptions
    judges: Sequence[Judge]
    extractors: Sequence[Extractor]
    distances: Sequence[str]
    store: Store
    reference: Solver | None
    seed: int
    batch: int
    dtype: torch.dtype
    fabric: Fabric
    tell: float | None

    @cached_property
    def model_sha256(self) -> str:
        """Of the model's files, and how it was loaded."""
        return model_fingerprint(self.model, self.model_options)

    @property
    def frechet_target(self) -> str:
        """What the Fréchet distance in the reward's features is taken to, in words."""
        if self.model in SHAPES_WORLD:
            return "true images of the same captions"
        return "none" if self.reference is None else "the reference's images"

    def seeds(self, prompts: Sequence[str]) -> list[int]:
        """A seed for each prompt."""
        return [self.seed + index for index in range(len(prompts))]

    def choose(self, solvers: Sequence[Solver], prompts: Sequence[str]) -> Comparison:
        """Solvers on the prompts that settings are chosen on: no reference, whose evaluations are most of the work."""
        evaluation = self.draw(solvers, prompts, None, final=False)
        entries = [Entry(solver, evaluation.measure(solver)) for solver in solvers]
        return Comparison(entries, self._frechet(evaluation), self.store, seed=self.seed)

    def compare(
        self, evaluation: Evaluation, solvers: Sequence[Solver], validation: Comparison | None, real: RealImages | None
    ) -> tuple[Comparison, Entry | None]:
        """What was drawn, solver by solver; and the reference, where there is one."""
        reference = None if self.reference is None else Entry(self.reference, evaluation.reference())
        entries = [Entry(solver, evaluation.measure(solver)) for solver in solvers]
        found = {**self._frechet(evaluation), **({} if real is None else self._real_distances(real))}
        return Comparison(entries, found, self.store, seed=self.seed, validation=validation), reference

    def real_images(self, path: Path) -> RealImages:
        """The real images, with all that the distances need. Raises InputError where something of it is missing."""
        real = self._folder(path) if path.is_dir() else RealImages.load(path)
        real.check(self.distances, self.extractors)
        return real

    def _folder(self, path: Path) -> RealImages:
        files = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in real_files(path)]
        description = {
            "kind": "real images",
            "files": [list(file) for file in files],
            "extractors": {judge.name: judge.fingerprint for judge in map(FeatureJudge, self.extractors)},
        }

        def compute() -> dict[str, Tensor]:
            with tqdm(total=len(files), unit="image", desc=str(path)) as bar:
                return folder_features(path, self.extractors, self.batch, bar.write, bar.update)

        return RealImages.of(str(path), self.store.fetch(description, compute), self.extractors)

    def _real_distances(self, real: RealImages) -> dict[str, SetDistance]:
        found = {}
        for distance in self.distances:
            extractor = next(one for one in self.extractors if (one.name == "clip") == (distance == "cmmd"))
            metric = distance if distance == "cmmd" else extractor.name.replace("inception", distance)
            values = partial(real.values, distance)
            found[metric] = SetDistance(extractor.name, f"{real.fingerprint} {CODE_OF_DISTANCES}", values)
        return found

    def draw(
        self, solvers: Sequence[Solver], prompts: Sequence[str], folders: SolverFolders | None, *, final: bool = True
    ) -> Evaluation:
        """Draw and judge solvers on prompts, shared out over the processes; all of it is kept.

        `final`: with the reference and the extractors, and what the number of prompts can tell is said.
        """
        reference = self.reference if final else None
        setting = Setting(
            prompts=prompts,
            seeds=self.seeds(prompts),
            model_fingerprint=self.model_sha256,
            batch_size=self.batch,
            dtype=self.dtype,
            previews=PREVIEWS,
        )
        judges = [*self.judges, *(map(FeatureJudge, self.extractors) if final else ())]
        all_solvers = [*([] if reference is None else [reference]), *solvers]
        with tqdm(unit="evaluation", disable=not self.fabric.is_global_zero) as bar:
            evaluation = Evaluation(
                self.denoiser, judges, setting, self.store, bar.update,
                reference=reference, writer=folders, processes=self.fabric.world_size,
            )  # fmt: skip
            first = setting.parts[0]

            def tell(rows: slice) -> None:
                if final and rows == first:
                    bar.write(self._power(evaluation, solvers, rows))

            draw_together(evaluation, all_solvers, self.fabric, bar, tell)
            if self.fabric.is_global_zero and first not in evaluation.rows_of(0):
                tell(first)
        return evaluation

    def _power(self, evaluation: Evaluation, solvers: Sequence[Solver], part: slice) -> str:
        """What the number of prompts can tell, by how paired rewards spread on the first part of them."""
        scores = [(solver.label, evaluation.judged(solver, part)["reward"]) for solver in solvers]
        pairs = itertools.combinations(scores, 2)
        spreads = [(ours - theirs).std().item() for (one, ours), (other, theirs) in pairs if one != other]
        if not spreads:
            return "one solver alone: no difference to tell"
        spread, count = statistics.median(spreads), len(evaluation.setting.prompts)
        needed = "" if self.tell is None else f"; to tell {self.tell:g} takes {pairs_needed(spread, self.tell):,}"
        return (
            f"on the first {part.stop} prompts two solvers' rewards differ by a deviation of {spread:.3g}: {count:,} "
            f"prompts tell a difference of {tellable_difference(spread, count):.2g} (4 times in 5, at 95%){needed}"
        )

    def _frechet(self, evaluation: Evaluation) -> dict[str, SetDistance]:
        """In the features of the first reward, to true images where the world can draw them, or to the reference's."""
        name = "reward_features"
        if self.model in SHAPES_WORLD:
            prompts, said = evaluation.setting.prompts, {"true images": CODE_OF_TRUE_IMAGES, "seed": self.seed}
            target = evaluation.features(name, lambda part: true_images(prompts[part], self.seed, part.start), said)
        elif evaluation.reference_solver is not None:
            target = evaluation.reference().features(name)
        else:
            return {}
        digest = hashlib.sha256(target.numpy().tobytes()).hexdigest()
        values = SetDistance(name, f"{digest} {CODE_OF_DISTANCES}", lambda seen: paired_frechet_values(seen, target))
        return {"frechet": values}


def draw_together(
    evaluation: Evaluation,
    solvers: Sequence[Solver],
    fabric: Fabric,
    bar: tqdm,
    after: Callable[[slice], None] = lambda rows: None,
) -> None:
    """Have every process draw and judge its share of the prompts by all solvers, the reference among them, if any.

    `bar` says how far this process is, and in the end how long all took; `after` is told of the prompts that it has
    done. All of it is kept in the end.
    """
    start = perf_counter()
    mine = evaluation.rows_of(fabric.global_rank)
    bar.reset(total=evaluation.evaluations_ahead(solvers, mine))
    for rows in mine:
        for solver in solvers:
            bar.set_description(f"{solver.label} {solver.grid_name}, NFE {solver.evaluations.parallel}")
            evaluation.work(solver, rows)
        after(rows)
    fabric.barrier()
    if fabric.is_global_zero:
        evaluation.join(solvers)
        bar.write(f"drawn and judged in {perf_counter() - start:.1f} s")
    fabric.barrier()
