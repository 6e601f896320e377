"""A few-step solver tuned by RLEPD, as a scheduler of diffusers.

This one file needs torch, numpy and diffusers only; the solver's numbers lie in scheduler_config.json beside it, in a
folder or in a repository of the Hub.

    pipe.scheduler = EPDScheduler.from_pretrained(folder)
    image = pipe(prompt, **pipe.scheduler.pipeline_arguments()).images[0]

The ODE dx/dσ = (x - D(x, σ)) / σ is followed down σ_0 > ... > σ_S in S intervals. With row i of the columns, a = σ_i
and b = σ_{i+1}, an interval is

    D̄_i = D_i + Σ_j history_ij (D_j - D_i)                    D_i = D(x, a), the estimate of the clean latents
    c_i = (x - D̄_i) / a,    d = c_i + Σ_j direction_history_ij (c_j - c_i)
    x_k = x + (τ_k - a) d,   τ_k = b^r_k · a^(1 - r_k)         r = positions
    d_k = (x_k - D(x_k, scale_time_k · τ_k)) / τ_k
    x  <- x + (b - a) Σ_k weights_k · scale_dir_k · d_k        without points, K = 0:  x <- x + (b - a) d

after arXiv 2507.14797 and 2512.22796: 1 + K evaluations, and as many timesteps and calls of `step`. Between the calls a
pipeline holds x / sqrt(1 + σ²), as the network takes it, σ what the network is told, and in the end x; for flow
matching x all along.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


class GuidanceScale(float):
    """What pipelines multiply by to guide; of a solver with `guidance` the scale of the evaluation at hand.

    Pipelines guide where `guidance_scale > 1`. Here they always do: 1 is the answer with the text alone, and 0 that
    without.
    """

    scheduler: EPDScheduler | None = None
    """Whose `guidance` the scale follows."""

    def __gt__(self, other: float) -> bool:
        """Say yes to the question whether to guide."""
        return True

    def __mul__(self, other: Any) -> Any:
        """The product with the scale at hand."""
        return (float(self) if self.scheduler is None else self.scheduler.guidance_at_hand()) * other


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """The solver as a scheduler: the loop of any pipeline plays it, one evaluation after another.

    Args:
        sigmas: the S + 1 noise levels in the scaling x0 + σ·noise, (1 - σ)·x0 + σ·noise for flow matching; descending.
        positions, weights, scale_dir, scale_time: S rows of K numbers; the first two are None where K = 0, the others
            where they are 1.
        guidance: S rows of 1 + K scales, the one at the interval's start first; None where one scale serves all.
        history, direction_history: S rows of S numbers, strictly lower triangular; None for zeros.
        guidance_scale: the one scale that the solver was tuned for, where there is no `guidance`.
        afs: must be False.
        prediction_type: epsilon, v_prediction or flow_prediction.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the model's noise schedule, as in other
            schedulers; a flow-matching model needs the first alone.
        use_flow_sigmas: for pipelines that ask for it; follows from `prediction_type`.
        clip_sample, clip_sample_range: whether estimates D are clamped to ± the range, as DDPMs in pixel space have it.

    Raises ValueError for numbers that are no solver.
    """

    __module__ = Path(__file__).stem  # under which a pipeline's model_index.json names it, wherever it was loaded from

    @register_to_config
    def __init__(
        self,
        sigmas: list[float] | None = None,
        positions: list[list[float]] | None = None,
        weights: list[list[float]] | None = None,
        scale_dir: list[list[float]] | None = None,
        scale_time: list[list[float]] | None = None,
        guidance: list[list[float]] | None = None,
        history: list[list[float]] | None = None,
        direction_history: list[list[float]] | None = None,
        guidance_scale: float | None = None,
        afs: bool = False,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        use_flow_sigmas: bool | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        """Multiply the columns out on the grid."""
        if sigmas is None:
            raise ValueError("this configuration holds no solver: it has no sigmas. Take one that RLEPD exported")
        if afs:
            raise ValueError(
                "afs: the solver takes its first direction without asking the network, and a pipeline asks it at every "
                "timestep. Tune or export a solver without AFS"
            )
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type {prediction_type!r} is not known; known are {', '.join(PREDICTIONS)}")
        self._is_flow = prediction_type == "flow_prediction"
        self.register_to_config(use_flow_sigmas=self._is_flow)
        levels = np.asarray(sigmas, dtype=np.float64)
        if levels.ndim != 1 or len(levels) < 2 or not (np.diff(levels) < 0).all() or not 0 < levels[-1] < np.inf:
            raise ValueError(f"sigmas must be at least two positive numbers, each below the one before; got {sigmas}")
        if self._is_flow and abs(levels[0] - 1) > 1e-4:
            raise ValueError(
                f"sigmas must start at 1 for flow matching, where pipelines start from noise alone; got {levels[0]:g}"
            )
        self._intervals, self._points = len(levels) - 1, len(positions[0]) if positions else 0
        a, b = levels[:-1, None], levels[1:, None]
        r, w = (self._column(name, self._points, 0.0) for name in ("positions", "weights"))
        self._levels = np.concatenate([a, b**r * a ** (1 - r)], axis=1)  # [S, 1 + K], of each evaluation
        self._told = self._levels.copy()  # what the network is told of them
        self._told[:, 1:] *= self._column("scale_time", self._points, 1.0)
        self._inverse_norms = np.ones((len(levels), 1 + self._points))  # of what a pipeline holds; it ends at x itself
        if not self._is_flow:
            self._inverse_norms[:-1] = (1 + self._told**2) ** -0.5
        self._gains = np.zeros_like(self._told)  # what of x - D goes into the interval's end
        self._gains[:, 1:] = (b - a) * w * self._column("scale_dir", self._points, 1.0) / self._levels[:, 1:]
        self._guidance = None if guidance is None else self._column("guidance", 1 + self._points, 1.0)
        self._follows_guidance = guidance is not None and len(np.unique(self._guidance)) > 1
        self._history, self._direction_history = (
            self._column(name, self._intervals, 0.0) for name in ("history", "direction_history")
        )
        self._final = levels[1:]
        self._betas = None if self._is_flow else self._noise_schedule()
        self.points_at_once = False
        """Whether all K points of an interval are one call of K rows for each sample, which few pipelines can ask."""
        self.init_noise_sigma = float(levels[0] * self._inverse_norms[0, 0])
        self.set_timesteps(self._intervals)

    def _column(self, name: str, width: int, neutral: float) -> np.ndarray:
        """A column of the configuration as float64 [S, width]."""
        entries = getattr(self.config, name)
        if entries is None or not width:
            return np.full((self._intervals, width), neutral)
        try:
            column = np.asarray(entries, dtype=np.float64)
        except ValueError:  # rows of different lengths
            column = np.empty(0)
        if column.shape != (self._intervals, width) or not np.isfinite(column).all():
            raise ValueError(f"{name} must be {self._intervals} rows of {width} finite numbers, one row an interval")
        return column

    def _noise_schedule(self) -> np.ndarray:
        config = self.config
        if config.trained_betas is not None:
            return np.asarray(config.trained_betas, dtype=np.float64)
        if config.beta_schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"beta_schedule {config.beta_schedule!r} is not known; known are linear and scaled_linear")
        power = 2 if config.beta_schedule == "scaled_linear" else 1
        ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        return np.linspace(*ends, config.num_train_timesteps) ** power

    def _timesteps_of(self, levels: np.ndarray) -> np.ndarray:
        """What the network takes for its noise level: log α is continued linearly between the steps of its training."""
        if self._betas is None:
            return levels * self.config.num_train_timesteps
        knots = 0.5 * np.log1p(-self._betas).cumsum()
        log_alphas = -0.5 * np.log1p(levels**2)
        right = np.searchsorted(-knots, -log_alphas).clip(1, len(knots) - 1)
        return right - (log_alphas - knots[right]) / (knots[right - 1] - knots[right])

    # ------------------------------------------------------------------------------------------- the pipeline's side

    @property
    def order(self) -> int:
        """Calls of `step` in an interval, by which pipelines count their steps."""
        return 1 + (min(self._points, 1) if self.points_at_once else self._points)

    @property
    def step_index(self) -> int | None:
        """The number of the next call of `step`, counted from the grid's start; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The number of the first call, where a pipeline has set it."""
        return self._begin_index

    def __len__(self) -> int:
        """The number of the model's own timesteps."""
        return self.config.num_train_timesteps

    def pipeline_arguments(self) -> dict[str, Any]:
        """What a stock pipeline must be called with to play the solver as it was tuned.

        That is num_inference_steps, and guidance_scale where the solver says its guidance.
        """
        arguments: dict[str, Any] = {"num_inference_steps": self._intervals}
        scale = self.config.guidance_scale if self._guidance is None else float(self._guidance[0, 0])
        if scale is None:
            return arguments
        if scale == 1 and not self._follows_guidance:
            return {**arguments, "guidance_scale": 1.0}  # there is nothing to guide
        guidance = GuidanceScale(scale)
        guidance.scheduler = self if self._follows_guidance else None
        return {**arguments, "guidance_scale": guidance}

    def guidance_at_hand(self) -> float:
        """The scale in `guidance` of the next call of `step`; whoever asks is taken to guide by it."""
        self._guidance_is_asked = True
        return self.guidance_of_call()[0]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Start anew. The noise levels are the solver's own; pipelines may pass theirs, which must be no others.

        Of `sigmas` also what FLUX's pipelines pass where their caller does not, 1, 1 - 1/S, ..., 1/S, is taken for
        nothing said. `mu` shifts a grid, and the solver's is where it shall be. Raises ValueError for another number of
        steps than S, and for other levels or timesteps.
        """
        self.num_inference_steps = self._intervals
        if timesteps is None and sigmas is None and num_inference_steps != self._intervals:
            raise ValueError(
                f"the solver has {self._intervals} intervals: num_inference_steps must be {self._intervals}, not "
                f"{num_inference_steps}"
            )
        calls = self._timesteps_of(self._told)[:, : self.order].flatten()
        usual = np.linspace(1, 1 / self._intervals, self._intervals)
        own_levels = (self._levels[:, 0], np.append(self._levels[:, 0], self._final[-1]), *([usual] * self._is_flow))
        for name, given, known in (("timesteps", timesteps, (calls,)), ("sigmas", sigmas, own_levels)):
            if given is not None and not any(
                len(given) == len(own) and np.allclose(given, own, rtol=1e-4) for own in known
            ):
                raise ValueError(
                    f"the solver has {name} of its own, {known[0].round(4).tolist()}: leave {name} out and give "
                    f"num_inference_steps={self._intervals}, or change its configuration"
                )
        self.timesteps = torch.tensor(calls, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor([*self._levels[:, : self.order].flatten(), self._final[-1]], dtype=torch.float32)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._guidance_is_asked = False
        self._estimates: list[tuple[int, Tensor]] = []  # at the starts of the intervals so far
        self._directions: list[tuple[int, Tensor]] = []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin in the middle of the grid, at the start of an interval: the timestep at which an image was noised."""
        if begin_index % self.order or not 0 <= begin_index < len(self.timesteps):
            raise ValueError(
                f"the solver can begin at the start of an interval, at one of its evaluations "
                f"{list(range(0, len(self.timesteps), self.order))}, not at {begin_index}"
            )
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents as they are: the network takes them so."""
        self._enter(timestep)
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents with the noise of the next evaluation, or before the first one of `timesteps`, all the same."""
        index = self._step_index
        if index is None:
            index = self._begin_index if self._begin_index is not None else self._start_at(timesteps.flatten()[0])
        sigma, inverse_norm = self.sigmas[index].item(), self._per_row(self._inverse_norms, index, noise)
        return ((1 - sigma if self._is_flow else 1) * original_samples + sigma * noise) * inverse_norm

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as the pipelines of flow-matching models call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: object = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the network's answer at one evaluation to the latents of the next, in the dtype of `sample`.

        sample: [B, ...]; with `points_at_once` between an interval's start and its end [B·K, ...], row b·K + k for
        point k of sample b. The arithmetic is in float32 at least. generator: some pipelines hand one on; nothing is
        drawn. Raises ValueError where the pipeline does not guide by the scales of `guidance`.
        """
        index = self._enter(timestep)
        if self._follows_guidance and not (self._guidance_is_asked or self.points_at_once):
            raise ValueError(
                "the solver has a guidance scale for each evaluation, and the pipeline does not guide by it: call it "
                "with **scheduler.pipeline_arguments(). A pipeline that fixes its guidance before the first step, as "
                "FLUX's do, can play at one scale alone: EPDScheduler.from_pretrained(FOLDER, guidance=None)"
            )
        interval, stage = divmod(index, self.order)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x = x / self._per_row(self._inverse_norms, index, x)
        estimate = self._estimate(x, model_output.to(x.dtype), index)
        if stage == 0:
            self._begin_interval(interval, x, estimate)
        else:
            change = self._per_row(self._gains, index, x) * (x - estimate)
            self._following = self._following + change.unflatten(0, (len(self._start), -1)).sum(1)
        self._step_index = index + 1
        if stage + 1 < self.order:
            offsets = self._levels[interval, self._columns(index + 1)] - self._levels[interval, 0]
            moves = torch.tensor(offsets, dtype=x.dtype, device=x.device).view(1, -1, *[1] * (x.ndim - 1))
            latents = (self._start[:, None] + moves * self._direction[:, None]).flatten(0, 1)
        else:
            latents = self._following
        latents = (latents * self._per_row(self._inverse_norms, self._step_index, latents)).to(sample.dtype)
        return SchedulerOutput(latents) if return_dict else (latents,)

    @property
    def _index_of_call(self) -> int:
        return (self._begin_index or 0) if self._step_index is None else self._step_index

    def timesteps_of_call(self) -> Tensor:
        """[n]: what the network takes at the evaluations of its next call; n is K at all points at once."""
        index = self._index_of_call
        told = self._told[index // self.order, self._columns(index)]
        return torch.tensor(self._timesteps_of(told), dtype=torch.float32, device=self.timesteps.device)

    def guidance_of_call(self) -> list[float]:
        """[n]: likewise the scales of `guidance`."""
        index = self._index_of_call
        return self._guidance[index // self.order, self._columns(index)].tolist()

    # -------------------------------------------------------------------------------------------------- the solver

    def _begin_interval(self, interval: int, x: Tensor, estimate: Tensor) -> None:
        """Take the direction in which the points lie, or which without points leads to the interval's end."""
        start = self._levels[interval, 0]
        estimate = _recalling(self._history[interval], interval, estimate, self._estimates)
        slope = (x - estimate) / start
        self._direction = _recalling(self._direction_history[interval], interval, slope, self._directions)
        self._start = self._following = x
        if not self._points:
            self._following = x + (self._final[interval] - start) * self._direction

    def _estimate(self, x: Tensor, output: Tensor, index: int) -> Tensor:
        """D(x, σ) from the network's answer, σ what it was told."""
        told = self._per_row(self._told, index, x)
        estimate = x - told * output
        if self.config.prediction_type == "v_prediction":
            inverse_norm = self._per_row(self._inverse_norms, index, x)
            estimate = inverse_norm**2 * x - told * inverse_norm * output
        bound = self.config.clip_sample_range
        return estimate.clamp(-bound, bound) if self.config.clip_sample else estimate

    def _columns(self, index: int) -> slice:
        """Which of an interval's 1 + K evaluations a call of the network makes."""
        stage = index % self.order
        return slice(1, None) if self.points_at_once and stage else slice(stage, stage + 1)

    def _per_row(self, column: np.ndarray, index: int, x: Tensor) -> float | Tensor:
        """Numbers of the evaluations that the rows of x are for: [S, 1 + K] -> one number, or [rows, 1, ...]."""
        values = column[index // self.order, self._columns(index)]
        if len(values) == 1:
            return float(values[0])
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = torch.tensor(values, dtype=dtype, device=x.device).repeat(len(x) // len(values))
        return rows.view(-1, *[1] * (x.ndim - 1))

    def _enter(self, timestep: float | Tensor | None) -> int:
        """The number of the present call, which the first one finds out."""
        if self._step_index is None:
            self._step_index = self._start_at(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError("the solver has come to its end: call set_timesteps before another run")
        return self._step_index

    def _start_at(self, timestep: float | Tensor) -> int:
        """The number of the evaluation that has this timestep and starts an interval."""
        found = (self.timesteps[:: self.order] - float(timestep)).abs() < 1e-3
        if not found.any():
            starts = self.timesteps[:: self.order].tolist()
            raise ValueError(f"the solver can begin at the timesteps {starts}, where its intervals start: {timestep}")
        return int(found.nonzero()[0]) * self.order

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the configuration, and this file beside it, so that whoever loads a pipeline has its scheduler too."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy = Path(save_directory) / f"{self.__module__}.py"
        if copy.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, copy)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _recalling(row: np.ndarray, interval: int, own: Tensor, earlier: list[tuple[int, Tensor]]) -> Tensor:
    """y_i + Σ_j row_j (y_j - y_i) over the intervals that were run; keeps y_i = own for those that follow."""
    found = own
    for j, other in earlier:
        if row[j]:
            found = found + float(row[j]) * (other - own)
    earlier.append((interval, own))
    return found
