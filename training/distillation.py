"""Distil a solver from a teacher that takes M extra steps inside each interval of the student's first grid.

What is learned of the student is named by column (`training.parameters`): positions and weights of its points, its
grid, what it remembers. Guidance is not: the teacher follows one scale, and nothing in it says that another is better.

Student and teacher start from the same noise; the student's state x_i at grid point i should be the teacher's x*_i.
Gradient descent from an arbitrary table is a bad way to get there. With d_k = d_i + (D_i - D_k) / tau_k (section 3 of
the design: the same formula, sorted by the denoised estimates D), one interval moves by

    x_{i+1} - x_i = (sigma_{i+1} - sigma_i) (d_i + sum_k w_k (D_i - D_k) / tau_k)

so a point at tau << sigma_i multiplies what the network changed its mind about by sigma_i / tau, up to some hundreds in
the last interval. From evenly spaced points and equal weights a first interval of sigma 14.6 to 1.6 at guidance 7.5
throws the state far away, the later intervals start where the network knows nothing, and the gradient there is flat or
wrong. Three things mend it.

1. SEARCH, interval by interval, without gradients (`search`). With x_i fixed, everything that the points of an interval
   can do lies on ONE curve, r -> d(r). It is evaluated at sixteen positions; the loss of every choice of K of them and
   its best weights on the simplex is then a small quadratic problem in inner products of the curve's points, so all
   choices are compared exactly. Without points x_{i+1} is linear in the interval's row of history, and the best row is
   a least-squares problem. The interval is fixed and the student moves on, to fit the next one from where it really
   is: errors are seen by the later intervals and never grow unseen. There is no start to explode from, and the cost is
   known beforehand: seventeen evaluations an interval, or one without points.
2. REFINE, all intervals together (`Refinement`), with the gradient through the network. It is needed because an early
   interval is judged by the last state, and exact because positions act through the network's inputs. The network's
   weights ask for no gradients, so a backward pass costs about one forward pass.
3. The loss is a mean DISTANCE, not a mean square, in units of the teacher's own movement (`trajectory_loss`). Under
   strong guidance a few trajectories fork: no table of few steps can follow them, and squared they would rule the
   update. A distance gives each trajectory a pull of the same size. It is that of the last states, through the whole
   solver, and to a tenth that of the states in between. Where the grid is learned it is that of the last states alone:
   the first and the last level stay, so their teacher is known whatever lies between, which for other levels it is not.

The refinement's best parameters by the loss on trajectories that it was not trained on are what comes out: never worse,
on those, than what the search found. Teacher trajectories are computed once and reused by every pass.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.generate import conditioned, initial_noise
from models.randomness import derived_seed, generator_of
from solvers import SAMPLERS, Denoise, EPDTable, epd_sampler
from training.parameters import GRID, SolverParameters
from training.runs.checkpoint import load_optimizer

# The search looks at so many positions, evenly spaced between these two. Nearer to the interval's start a point repeats
# the evaluation there; near its end it may fit the searched trajectories best, by a small weight on a large difference,
# and others badly (mixtures of Gaussians at guidance 7.5 showed it at 2 intervals; at 3 the far points did help).
SEARCHED_POSITIONS = 16
SEARCHED_RANGE = (0.05, 0.80)
# A weight of the search's result: with less a point would be wasted and its parameter hardly movable.
SMALLEST_WEIGHT = 0.02
# The table's few numbers an interval are known from few trajectories.
SEARCHED_TRAJECTORIES = 64
# Directions of the history's least squares that weigh less, beside the first or beside the estimate itself, are left
# alone: they would take large factors of opposite signs to gain next to nothing.
SMALLEST_CURVATURE = 1e-6

# Of the loss at the inner grid points beside the loss at the last one.
INNER_WEIGHT = 0.1
# In units of the teacher's movement: nearer than this, the distance is rounded off, so that its gradient exists.
DISTANCE_FLOOR = 1e-3
LARGEST_GRADIENT = 0.1
HELD_OUT_SHARE = 0.25

Target = Literal["latent", "image"]


@dataclass(frozen=True, eq=False)
class Task:
    """What the student has to solve, and with what.

    sigmas: the student's grid at first, float64 [S + 1]. afs: its first evaluation is estimated. target: where the last
    states are compared, as latents or as decoded images. micro_batch: latents that go through the network at once,
    before guidance and the K points multiply them. recompute: keep no activations of the network for the backward pass
    but compute them again: about a third slower, and the memory of one evaluation instead of all. progress: told of
    each evaluation of the network how many latents it takes.
    """

    denoiser: Denoiser
    guidance_scale: float | None
    sigmas: Tensor
    afs: bool = False
    target: Target = "latent"
    micro_batch: int = 16
    recompute: bool = False
    progress: Callable[[int], None] = lambda count: None

    @property
    def num_intervals(self) -> int:
        """S."""
        return len(self.sigmas) - 1

    def bind(self, prompts: Sequence[str]) -> Denoise:
        """The solver's view of the model for these prompts."""
        conditioning = self.denoiser.encode(prompts, self.guidance_scale)
        return conditioned(self.denoiser, conditioning, asked=self.progress, recompute=self.recompute)

    def read_out(self, latents: Tensor) -> Tensor:
        """What the last states are compared by, [N, ...]."""
        return self.denoiser.decode(latents) if self.target == "image" else latents


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The teacher's states at the levels of the task, states [S + 1, N, C, H, W], one prompt for each of N."""

    prompts: Sequence[str]
    states: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.prompts)

    def select(self, indices: Sequence[int]) -> Trajectories:
        """Some of them."""
        return Trajectories([self.prompts[index] for index in indices], self.states[:, list(indices)])

    def batches(self, size: int) -> Iterator[Trajectories]:
        """All of them, in order, at most `size` at once."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))


# ------------------------------------------------------------------------------------------------------- teacher


@torch.no_grad()
def teacher_trajectories(
    task: Task, sampler: str, teacher_sigmas: Tensor, prompts: Sequence[str], seeds: Sequence[int]
) -> Trajectories:
    """Follow the teacher `sampler` down its grid and keep its states at the student's grid points."""
    stride = (len(teacher_sigmas) - 1) // task.num_intervals
    parts = []
    for start in range(0, len(prompts), task.micro_batch):
        batch = slice(start, start + task.micro_batch)
        noise = initial_noise(
            seeds[batch], task.denoiser.latent_shape, device=task.denoiser.device, dtype=torch.float32
        )
        states: list[Tensor] = []

        def keep(step: int, x: Tensor, states: list[Tensor] = states) -> None:
            if step % stride == 0:
                states.append(x)

        SAMPLERS[sampler](task.bind(prompts[batch]), noise * teacher_sigmas[0].to(noise), teacher_sigmas, callback=keep)
        parts.append(torch.stack(states))  # [S + 1, n, C, H, W]
    states = torch.cat(parts, dim=1)
    if not states.isfinite().all():
        raise InputError(f"the teacher {sampler} left the range of numbers: take more steps (M) or another teacher")
    return Trajectories(list(prompts), states)


# -------------------------------------------------------------------------------------------------------- search


@torch.no_grad()
def search(task: Task, trajectories: Trajectories, num_points: int) -> EPDTable:
    """The table whose intervals, one after the other, end nearest to the teacher's states; see the module, point 1.

    num_points: at most `SEARCHED_POSITIONS`.
    Returns positions and weights, float64 [S, K] on the CPU, positions increasing; without points, K = 0, the history.
    """
    return _search_points(task, trajectories, num_points) if num_points else _search_history(task, trajectories)


def _search_history(task: Task, trajectories: Trajectories) -> EPDTable:
    """x_{i+1} is where Euler's method goes, and sum_j h_ij (1 - b/a) (D_j - D_i); a, b the interval's ends."""
    batches = list(trajectories.batches(task.micro_batch))
    students = [batch.states[0] for batch in batches]
    estimates: list[list[Tensor]] = [[] for _ in batches]
    none = torch.empty(task.num_intervals, 0, dtype=torch.float64)
    history = torch.zeros(task.num_intervals, task.num_intervals, dtype=torch.float64)
    for i in range(task.num_intervals):
        interval = task.sigmas[i : i + 2]
        a, b = interval.tolist()
        moves: list[Tensor] = []
        products, projections, own = torch.zeros(i, i).double(), torch.zeros(i).double(), 0.0
        for number, (batch, x) in enumerate(zip(batches, students, strict=True)):
            euler = EPDTable(none[:1], none[:1])
            students[number] = epd_sampler(task.bind(batch.prompts), x, interval, euler, afs=task.afs and i == 0)
            estimates[number].append(x - a / (b - a) * (students[number] - x))
            known = (1 - b / a) * torch.stack(estimates[number]).flatten(1).double()
            moves.append(known[:-1] - known[-1])  # [i, n C H W]
            own += known[-1].square().sum().item()
            wanted = (batch.states[i + 1] - students[number]).flatten().double()
            products += (moves[-1] @ moves[-1].T).cpu()
            projections += (moves[-1] @ wanted).cpu()
        least = SMALLEST_CURVATURE * own
        history[i, :i] = torch.linalg.pinv(products, atol=least, rtol=SMALLEST_CURVATURE, hermitian=True) @ projections
        for number, move in enumerate(moves):
            x = students[number]
            students[number] = x + (history[i, :i].to(move) @ move).view_as(x).to(x)
    return EPDTable(none, none, history=history)


def _search_points(task: Task, trajectories: Trajectories, num_points: int) -> EPDTable:
    positions = torch.linspace(*SEARCHED_RANGE, SEARCHED_POSITIONS, dtype=torch.float64)
    batches = list(trajectories.batches(task.micro_batch))
    students = [batch.states[0] for batch in batches]
    rows: list[tuple[Tensor, Tensor]] = []
    for i in range(task.num_intervals):
        interval, afs = task.sigmas[i : i + 2], task.afs and i == 0
        products = torch.zeros(len(positions), len(positions), dtype=torch.float64)
        projections = torch.zeros(len(positions), dtype=torch.float64)
        for batch, x in zip(batches, students, strict=True):
            moves = _moves(task.bind(batch.prompts), x, interval, positions, afs=afs)  # [R, n * C * H * W]
            wanted = (batch.states[i + 1] - x).flatten().double()
            products += (moves @ moves.T).cpu()
            projections += (moves @ wanted).cpu()
        rows.append(best_points(products, projections, positions, num_points))
        row = EPDTable(rows[-1][0][None], rows[-1][1][None])
        students = [
            epd_sampler(task.bind(batch.prompts), x, interval, row, afs=afs)
            for batch, x in zip(batches, students, strict=True)
        ]
    return EPDTable(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))


def _moves(denoise: Denoise, x: Tensor, interval: Tensor, positions: Tensor, *, afs: bool) -> Tensor:
    """Where each position alone would take x: (sigma_{i+1} - sigma_i) d(r), float64 [R, N C H W].

    The EPD sampler makes the evaluations, one position a call; they are overheard on their way to it.
    """
    overheard: list[Tensor] = []

    def listen(x_k: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x_k, sigma)
        levels = sigma.to(x_k.device).double().reshape(-1, *[1] * (x_k.ndim - 1))
        overheard.append(((x_k - denoised).double() / levels).flatten())
        return denoised

    everywhere = EPDTable(positions[None], torch.full_like(positions, 1 / len(positions))[None])
    epd_sampler(listen, x, interval, everywhere, afs=afs, parallel=False)
    return float(interval[1] - interval[0]) * torch.stack(overheard[-len(positions) :])


def best_points(products: Tensor, projections: Tensor, positions: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """The K positions and weights w on the simplex that minimise |sum_k w_k m_k - wanted|^2, over all choices.

    products: m_a . m_b [R, R]; projections: m_a . wanted [R]; positions [R]. Returns two tensors [K].
    """
    choices = torch.tensor(list(combinations(range(len(positions)), num_points)))  # [P, K]
    gram = products[choices[:, :, None], choices[:, None, :]]  # [P, K, K]
    weights = simplex_least_squares(gram, projections[choices])
    losses = torch.einsum("pi,pij,pj->p", weights, gram, weights) - 2 * (weights * projections[choices]).sum(-1)
    best = int(losses.argmin())
    return positions[choices[best]], weights[best]


def simplex_least_squares(gram: Tensor, projections: Tensor, *, rounds: int = 100) -> Tensor:
    """argmin_w w' G w - 2 b' w over w_k >= SMALLEST_WEIGHT, sum w = 1, for a batch of problems.

    gram [P, K, K] positive semidefinite, projections [P, K] -> [P, K]. Weight is moved between two points at a time, by
    the exact minimum along that line (sequential minimal optimisation, Platt 1998); with two points once is enough.
    """
    num_points = projections.shape[-1]
    weights = torch.full_like(projections, 1 / num_points)
    for _ in range(rounds if num_points > 2 else 1):
        for a, b in combinations(range(num_points), 2):
            slope = projections - torch.einsum("pij,pj->pi", gram, weights)
            curvature = gram[:, a, a] - 2 * gram[:, a, b] + gram[:, b, b]
            moved = (slope[:, a] - slope[:, b]) / curvature.clamp_min(torch.finfo(gram.dtype).tiny)
            moved = moved.clamp(SMALLEST_WEIGHT - weights[:, a], weights[:, b] - SMALLEST_WEIGHT)
            weights[:, a] += moved
            weights[:, b] -= moved
    return weights


# -------------------------------------------------------------------------------------------------------- refine


@torch.no_grad()
def loss_scales(task: Task, trajectories: Trajectories) -> Tensor:
    """The units of the distances at the grid points 1..S, float64 [S]: root mean squares over trajectories.

    How far the teacher moves in the interval before; for the last point, if images are compared, how far an image is
    from the mean image.
    """
    moved = trajectories.states.diff(dim=0).flatten(2)  # [S, N, C * H * W]
    scales = moved.double().square().sum(-1).mean(-1).sqrt()
    if task.target == "image":
        parts = trajectories.batches(task.micro_batch)
        images = torch.cat([task.read_out(part.states[-1]).flatten(1) for part in parts]).double()
        scales[-1] = (images - images.mean(0)).square().sum(-1).mean().sqrt()
    return scales.clamp_min(torch.finfo(scales.dtype).tiny)


def trajectory_loss(
    task: Task, table: EPDTable, trajectories: Trajectories, scales: Tensor, sigmas: Tensor | None = None
) -> Tensor:
    """How far the student ends from the teacher, [N], differentiable in the table and in sigmas.

        loss_n = |F(x_S) - F(x*_S)| / m_S + INNER_WEIGHT / (S - 1) sum_{0 < i < S} |x_i - x*_i| / m_i

    with F the identity or the decoder, m the `loss_scales`, and |.| rounded off below DISTANCE_FLOOR. `sigmas` are
    other levels than the task's, where they are given; the teacher is not known there, and the sum is left out.
    """
    states: list[Tensor] = []
    epd_sampler(
        task.bind(trajectories.prompts),
        trajectories.states[0],
        task.sigmas if sigmas is None else sigmas,
        table,
        afs=task.afs,
        callback=lambda _, x: states.append(x),
    )
    with torch.no_grad():
        wanted = task.read_out(trajectories.states[-1])
    loss = _distance(task.read_out(states[-1]), wanted, scales[-1])
    for i in range(1, task.num_intervals if sigmas is None else 1):
        inner = _distance(states[i], trajectories.states[i], scales[i - 1])
        loss = loss + INNER_WEIGHT / (task.num_intervals - 1) * inner
    return loss


def _distance(found: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Euclidean distance of each row in units of `scale`, [N]; its gradient exists at 0."""
    squares = (found - wanted).flatten(1).double().square().sum(-1) / scale**2
    return (squares + DISTANCE_FLOOR**2).sqrt() - DISTANCE_FLOOR


class Refinement:
    """Adam on a student's parameters, all intervals together; each update has its own batch of trajectories.

    Which trajectories an update sees, and its step size, follow from its number alone; so parameters, optimizer and
    number (`state_dict`) are all that a resumed run needs to end in the same solver.
    """

    def __init__(
        self,
        task: Task,
        student: SolverParameters,
        trajectories: Trajectories,
        held_out: Trajectories,
        *,
        batch: int,
        updates: int,
        learning_rate: float,
        cosine: bool,
        seed: int,
    ) -> None:
        """Train `student` for `updates` on `trajectories`, `batch` at a time; `held_out` is for choosing the best."""
        self.task, self.student = task, student
        self.trajectories, self.held_out = trajectories, held_out
        self.batch, self.updates, self.seed = batch, updates, seed
        self.learning_rate, self.cosine = learning_rate, cosine
        self.scales = loss_scales(task, trajectories)
        self.optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate, betas=(0.9, 0.99))
        self.done = 0

    def step(self) -> tuple[float, float]:
        """One update: the batch's mean loss before it, and the step size.

        Raises InputError where the loss is no longer a number, or the solver none.
        """
        rate = self.learning_rate
        if self.cosine:
            rate *= 0.5 * (1 + math.cos(math.pi * self.done / self.updates))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        batch = self.trajectories.select(self._drawn())
        loss = 0.0
        for part in batch.batches(self.task.micro_batch):
            share = self._loss(part).sum() / len(batch)
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), LARGEST_GRADIENT)
        if not math.isfinite(loss):
            raise InputError(f"distillation diverged at update {self.done}: the loss is {loss}; try a smaller --lr")
        self.optimizer.step()
        self.done += 1
        return loss, rate

    def solver(self) -> tuple[EPDTable, Tensor]:
        """The student's table and noise levels. Raises InputError where the updates have led to what is no solver."""
        try:
            return self.student.table(), self.student.sigmas()
        except ValueError as error:
            raise InputError(f"distillation diverged at update {self.done}: {error}; try a smaller --lr") from error

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss on the trajectories that no update sees."""
        parts = self.held_out.batches(self.task.micro_batch)
        return torch.cat([self._loss(part) for part in parts]).mean().item()

    def _loss(self, trajectories: Trajectories) -> Tensor:
        table, sigmas = self.solver()
        learned = sigmas if GRID in self.student.learned else None
        return trajectory_loss(self.task, table, trajectories, self.scales, learned)

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values: what `load_state_dict` needs."""
        return {
            "done": self.done,
            "parameters": {name: tensor.clone() for name, tensor in self.student.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from where `state_dict` was called."""
        self.done = operator.index(state["done"])
        self.student.load_state_dict(state["parameters"])
        load_optimizer(self.optimizer, state["optimizer"])

    def _drawn(self) -> list[int]:
        """The trajectories of the next update: all of them are seen in turn, in a new order each time."""
        places = range(self.done * self.batch, (self.done + 1) * self.batch)
        rounds = {place // len(self.trajectories) for place in places}
        orders = {number: self._order(number) for number in rounds}
        return [orders[place // len(self.trajectories)][place % len(self.trajectories)] for place in places]

    def _order(self, number: int) -> list[int]:
        generator = generator_of(derived_seed("distillation: order of trajectories", self.seed, number))
        return torch.randperm(len(self.trajectories), generator=generator).tolist()
