"""Pipelines that ask for the K points of an interval in one call, and guide each evaluation at the solver's own scale.

    pipe = EPDStableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.load_solver("OWNER/NAME")              # or a folder with scheduler_config.json
    image = pipe("a large red star").images[0]

They are the stock pipelines of Stable Diffusion, XL and 3: what these can, they can. Steps are the solver's intervals:
`callback_on_step_end` sees the latents at an interval's end, and the progress bar moves there.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .scheduling_epd import EPDScheduler

NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


class EPDPipelineMixin:
    """What makes a stock pipeline play an EPD solver in parallel; it goes in front of it in the list of bases.

    The stock loop stays as it is. Between the start and the end of an interval its latents are the K points of each
    sample, and on its way into the network a call is given the text and the timestep of every point.
    """

    predictions = ("epsilon", "v_prediction")
    """The kinds of prediction that the family's networks make."""

    def load_solver(self, solver: str | Path, **options: Any) -> None:
        """Take the solver of a folder, or of a repository of the Hub, in place of the present scheduler.

        `options` are those of `from_pretrained` (revision, subfolder, token), and entries of the configuration that
        shall be others. Raises ValueError where the solver was made for a model with another noise schedule.
        """
        scheduler = EPDScheduler.from_pretrained(solver, **options)
        old, new = self.scheduler.config, scheduler.config
        differing = [key for key in NOISE_SCHEDULE if key in old and old[key] != new[key]]
        if differing:
            faults = "; ".join(f"{key} is {new[key]!r}, and here {old[key]!r}" for key in differing)
            raise ValueError(f"{solver} was made for another kind of model: its {faults}")
        if new.prediction_type not in self.predictions:
            raise ValueError(f"{solver} was made for another kind of model: its network makes a {new.prediction_type}")
        self.scheduler = scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw images as the stock pipeline does; the solver says num_inference_steps and, unless given, the guidance.

        Raises ValueError where no solver was loaded, for another number of steps than its own, and for a
        guidance_scale where the solver has one for each evaluation.
        """
        draw = super().__call__
        given = inspect.signature(draw).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if type(self.scheduler).__name__ != EPDScheduler.__name__:
            raise ValueError(f"the pipeline's scheduler is a {type(self.scheduler).__name__}: call load_solver first")
        if "guidance_scale" in given and self.scheduler.config.guidance is not None:
            raise ValueError(f"guidance_scale {given['guidance_scale']:g}: the solver has one for each evaluation")
        callback = given.pop("callback_on_step_end", None)
        if callback is not None:
            given["callback_on_step_end"] = partial(_at_the_end_of_an_interval, callback)
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        with self._points_at_once():
            drawn = draw(**{**self.scheduler.pipeline_arguments(), **given})
            if (self.scheduler.step_index or 0) % self.scheduler.order:
                raise ValueError("the loop ended inside an interval: it can be left early only where one ends")
            return drawn

    @contextmanager
    def _points_at_once(self) -> Iterator[None]:
        network = self.components.get("unet", self.components.get("transformer"))
        hook = network.register_forward_pre_hook(self._for_all_points, with_kwargs=True)
        self.scheduler.points_at_once = True
        self.scheduler.set_timesteps(self.scheduler.num_inference_steps)
        try:
            yield
        finally:
            self.scheduler.points_at_once = False
            hook.remove()

    def _for_all_points(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The network's arguments, with the text and the timestep of every row of its latents.

        Latents come with a row for each sample and point, those without the text first. All else comes with one for
        each sample, and is cut to the half with the text where this call goes without guidance.
        """
        latents = args[0] if args else kwargs.pop("hidden_states")
        timesteps = self.scheduler.timesteps_of_call()
        points = len(timesteps)
        rows = len(latents) // points  # of the text
        self._samples = rows // 2 if self.do_classifier_free_guidance else rows
        told = timesteps.to(latents.device).repeat(rows)
        kwargs = tree_map_only(Tensor, lambda each: each[-rows:].repeat_interleave(points, dim=0), kwargs)
        if args:
            return (latents, told), kwargs
        return (), {**kwargs, "hidden_states": latents, "timestep": told}

    @property
    def _plays_guidance(self) -> bool:
        return self.scheduler.config.get("guidance") is not None and self.scheduler.points_at_once

    @property
    def guidance_scale(self) -> float | Tensor:
        """The scale of the present call: one number, or one for each row of its latents."""
        if not self._plays_guidance:
            return super().guidance_scale
        scales = self.scheduler.guidance_of_call()
        if len(scales) == 1:
            return scales[0]
        return torch.tensor(scales, device=self._execution_device).repeat(self._samples)[:, None, None, None]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present call needs the rows without the text; the first one has them if any call does."""
        if not self._plays_guidance:
            return super().do_classifier_free_guidance
        rows = [self.scheduler.guidance_of_call()] if self.scheduler.step_index else self.scheduler.config.guidance
        return any(scale != 1 for row in rows for scale in row)

    @property
    def num_timesteps(self) -> int:
        """The number of steps that callbacks see: the solver's intervals."""
        return self.scheduler.num_inference_steps

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model_index.json, and the code that it names, so that a saved pipeline loads as what it is."""
        super().save_config(save_directory, **kwargs)
        folder, own = Path(save_directory), Path(__file__)
        for file in (own, own.with_name("scheduling_epd.py")):
            shutil.copyfile(file, folder / file.name)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = [own.stem, type(self).__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class EPDStableDiffusionPipeline(EPDPipelineMixin, StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x, and all that has its parts."""


class EPDStableDiffusionXLPipeline(EPDPipelineMixin, StableDiffusionXLPipeline):
    """Stable Diffusion XL."""


class EPDStableDiffusion3Pipeline(EPDPipelineMixin, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5; also from a folder without T5, of which the stock pipeline has to be told."""

    predictions = ("flow_prediction",)
    _optional_components: ClassVar = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]


def _at_the_end_of_an_interval(
    callback: Callable[..., dict[str, Any]], pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]
) -> dict[str, Any]:
    """The user's callback, with the number of the interval; not called while the latents are points inside one."""
    index, order = pipe.scheduler.step_index, pipe.scheduler.order
    return {} if index % order else callback(pipe, index // order - 1, timestep, tensors)
