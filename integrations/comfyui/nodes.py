"""The nodes, in ComfyUI's V3 API."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from .epd import GUIDANCE, Solver, guided_by_row, read_solver, sample_epd

FOLDER = "epd_solvers"
CATEGORY = "sampling/epd"
EPDSolver = io.Custom("EPD_SOLVER")


class EPDSampler(comfy.samplers.KSAMPLER):
    """Starts at σ_0 times the noise, where the solver was tuned, and ends at its last noise level."""

    def __init__(self, solver: Solver, at_once: bool) -> None:
        """`at_once`: see `sample_epd`."""
        super().__init__(partial(_sample, solver=solver, at_once=at_once))

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        """Never: ComfyUI would start at sqrt(1 + σ_0²) times the noise."""
        return False


def _sample(model: Any, x: Tensor, sigmas: Tensor, *, solver: Solver, **options: Any) -> Tensor:
    guider = model.inner_model
    if solver.guidance is not None and not isinstance(guider, EPDGuider):
        raise ValueError(
            "this solver has a guidance scale for each evaluation: sample with SamplerCustomAdvanced and the EPD Guider"
        )
    x = sample_epd(model, x, sigmas, solver=solver, **options)
    # KSAMPLER divides the last state of a flow-matching model by 1 - σ; of other models this does nothing.
    return guider.inner_model.model_sampling.noise_scaling(sigmas[-1], torch.zeros_like(x), x)


class EPDGuider(comfy.samplers.CFGGuider):
    """Guides each row at the scale that the sampler says, or all at one."""

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """The denoised estimate; `timestep` is the noise level of each row."""
        scale, options = self.cfg, model_options or {}
        if GUIDANCE in options:
            scale, options = guided_by_row(options)
        positive, negative = self.conds.get("positive"), self.conds.get("negative")
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative, positive, scale, model_options=options, seed=seed
        )


class LoadEPDSolver(io.ComfyNode):
    """A solver's file from models/epd_solvers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        return io.Schema(
            node_id="LoadEPDSolver",
            display_name="Load EPD Solver",
            category=CATEGORY,
            description="A few-step solver tuned by RLEPD: a scheduler_config.json in models/epd_solvers.",
            inputs=[io.Combo.Input("file", options=folder_paths.get_filename_list(FOLDER))],
            outputs=[EPDSolver.Output(display_name="solver")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> float:
        """A changed file is read again."""
        return Path(folder_paths.get_full_path_or_raise(FOLDER, file)).stat().st_mtime

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read it."""
        return io.NodeOutput(read_solver(folder_paths.get_full_path_or_raise(FOLDER, file)))


class EPDSamplerNode(io.ComfyNode):
    """How the solver steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        tooltip = "All points of an interval in one call of the model: faster, and more memory. Never with a mask."
        return io.Schema(
            node_id="EPDSampler",
            display_name="EPD Sampler",
            category=CATEGORY,
            inputs=[
                EPDSolver.Input("solver"),
                io.Boolean.Input("points_at_once", default=True, tooltip=tooltip),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, solver: Solver, points_at_once: bool) -> io.NodeOutput:
        """Make it."""
        return io.NodeOutput(EPDSampler(solver, points_at_once))


class EPDSigmas(io.ComfyNode):
    """The solver's noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        tooltip = "Of an image: the share of the intervals that are run, from the last back. 1 starts from noise."
        return io.Schema(
            node_id="EPDSigmas",
            display_name="EPD Sigmas",
            category=CATEGORY,
            inputs=[
                EPDSolver.Input("solver"),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, solver: Solver, denoise: float) -> io.NodeOutput:
        """The last ones of them, [intervals + 1]; none where nothing is to be done."""
        run = round(denoise * solver.intervals)
        return io.NodeOutput(torch.FloatTensor(solver.sigmas[-run - 1 :] if run else []))


class EPDGuiderNode(io.ComfyNode):
    """Guidance as the solver says it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """What the node looks like."""
        tooltip = "The scale where the solver says none of its own."
        return io.Schema(
            node_id="EPDGuider",
            display_name="EPD Guider",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                EPDSolver.Input("solver"),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, tooltip=tooltip),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, solver: Solver, cfg: float) -> io.NodeOutput:
        """Make it. Refused where the network takes the scale as an input: it would be guided twice."""
        if model.model.model_config.unet_config.get("guidance_embed"):
            raise ValueError(
                "this model (FLUX) is told its guidance: set the solver's scale with FluxGuidance, and sample with "
                "BasicGuider; a solver with a scale for each evaluation cannot be played with it"
            )
        guider = EPDGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg if solver.guidance_scale is None else solver.guidance_scale)
        return io.NodeOutput(guider)


class EPDExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Its nodes."""
        return [LoadEPDSolver, EPDSamplerNode, EPDSigmas, EPDGuiderNode]


def register_folder() -> None:
    """Have ComfyUI look for solvers in models/epd_solvers."""
    folder = Path(folder_paths.models_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.folder_names_and_paths[FOLDER] = ([str(folder)], {".json"})
