"""What a network was trained to undo: how noise was added, and how the clean image follows from its answer.

A network knows noisy images in a scaling of its own. A solver sees them in one in which it starts from
sigma_max * noise, and D(x, sigma) is the estimate of the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from errors import InputError, first_line
from models.noise_levels import MOST_STEPS, NoiseLevels
from schedules import FlowTime

Prediction = Literal["epsilon", "v_prediction", "sample"]


class VariancePreserving(NoiseLevels):
    """x = x0 + sigma * noise, of which the network knows z = x / sqrt(1 + sigma^2), at step T t - 1, t sigma's time.

    epsilon prediction   D = x - sigma * eps
    v prediction         D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) * v      (arXiv 2202.00512, section 4)
    sample prediction    D is what the network predicts
    """

    prediction: Prediction = "epsilon"

    @classmethod
    def from_scheduler_config(
        cls, config: Mapping[str, Any], source: str, known: tuple[Prediction, ...] = ("epsilon", "v_prediction")
    ) -> VariancePreserving:
        """What a diffusers `scheduler_config.json` describes; `source` names the file in messages.

        Raises `InputError` for a beta schedule that no solver can follow, and a prediction that is none of `known`.
        """
        process = super().from_scheduler_config(config, source)
        process.prediction = config.get("prediction_type", "epsilon")
        if process.prediction not in known:
            raise InputError(f"{source}: prediction_type {process.prediction!r}; known are {' and '.join(known)}.")
        return process

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """See `Denoiser`."""
        return {**self.config, "prediction_type": self.prediction}

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """z of noisy images x [N, C, H, W] of levels sigma [N] (float64), in x's dtype."""
        return x * per_row((1.0 + sigma**2).rsqrt(), x)

    def network_time(self, sigma: Tensor) -> Tensor:
        """What the network is told of the levels [N]: a step of its training, fractional between two; float64."""
        return self.num_steps * self.time_of_sigma(sigma) - 1.0

    def estimate(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        """D(x, sigma) [N, C, H, W], from what the network predicts, in x's dtype."""
        if self.prediction == "epsilon":
            return x - per_row(sigma, x) * prediction
        if self.prediction == "sample":
            return prediction
        inverse_norm = (1.0 + sigma**2).rsqrt()
        return per_row(inverse_norm**2, x) * x - per_row(sigma * inverse_norm, x) * prediction


class FlowMatching(FlowTime):
    """x = (1 - sigma) x0 + sigma * noise, as the network knows it, at step T sigma; it predicts v = noise - x0.

    D = x - sigma * v. The level sigma is in (0, 1]; at 1 x is noise alone.
    """

    def __init__(self, shift: float, num_steps: int, time_min: float) -> None:
        """`num_steps`: T; the others as `FlowTime` takes them."""
        super().__init__(shift, time_min)
        self.num_steps = num_steps
        self.scheduler_config = {"num_train_timesteps": num_steps, "prediction_type": "flow_prediction"}

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], source: str, image_tokens: int) -> FlowMatching:
        """What a diffusers `scheduler_config.json` of flow matching describes; `source` names the file in messages.

        image_tokens: what the transformer reads of an image; a dynamic shift grows with them. Raises `InputError` for
        another kind of scheduler, and for numbers that are none.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler  # seconds to import; most commands need none of it

        kind = config.get("_class_name", "scheduler of no named class")
        if not str(kind).startswith("FlowMatch") or config.get("invert_sigmas"):
            raise InputError(f"{source}: this {kind} is no flow matching from noise at level 1 to images at 0.")
        try:
            given = FlowMatchEulerDiscreteScheduler.from_config(config).config
            steps, shift = int(given.num_train_timesteps), float(given.shift)
            if not 1 < steps <= MOST_STEPS:
                raise ValueError(f"num_train_timesteps is {steps}, not between 2 and {MOST_STEPS:,}")
            if given.use_dynamic_shifting:
                slope = (given.max_shift - given.base_shift) / (given.max_image_seq_len - given.base_image_seq_len)
                mu = given.base_shift + slope * (image_tokens - given.base_image_seq_len)
                return cls(math.exp(mu) if given.time_shift_type == "exponential" else mu, steps, 1 / steps)
            # diffusers shifts what the first training step is called, and the grid from there on once more.
            return cls(shift, steps, shift / steps / (1 + (shift - 1) / steps))
        except Exception as error:  # what a configuration makes the library trip over can be anything
            raise InputError(f"{source}: this is no usable {kind}: {first_line(error)}.") from error

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `VariancePreserving`; here x itself."""
        return x

    def network_time(self, sigma: Tensor) -> Tensor:
        """See `VariancePreserving`."""
        return self.num_steps * sigma

    def estimate(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        """See `VariancePreserving`."""
        return x - per_row(sigma, x) * prediction


Process = VariancePreserving | FlowMatching
"""How noise was added. Both know the range of noise levels, `sigma_min` and `sigma_max`, and the time of the former,
`time_min`; the latter is at time 1. `sigma_of_time` gives the levels between. `scheduler_config`: see `Denoiser`.
"""


def per_row(factors: Tensor, x: Tensor) -> Tensor:
    """[N] factors as [N, 1, 1, 1], where x is and in its dtype."""
    # Not waited for: where the noise levels are on the host, a solver's steps queue up on the device without a stop.
    return factors.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]
