"""What every frozen network that is used as a `Denoiser` has in common: guidance, noise levels, type, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from errors import InputError
from models.denoiser import Conditioning, GuidanceKind, Text
from models.processes import Process, per_row

Module = TypeVar("Module", bound=nn.Module)


def code_files(*modules: str) -> tuple[Path, ...]:
    """The source files of modules of this room, such as `families.stable_diffusion`."""
    return tuple(Path(__file__).parent / f"{module.replace('.', '/')}.py" for module in modules)


class Backbone(ABC):
    """A network with the process that it undoes; frozen, in evaluation mode.

    The network computes in `dtype`; guidance and the estimate D are formed in x's dtype, the noise levels in float64.
    """

    code = code_files("backbone", "noise_levels", "processes")

    def __init__(
        self,
        name: str,
        network: nn.Module,
        process: Process,
        guidance: GuidanceKind,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`network` is moved to the device: see `frozen`."""
        self.name, self.device, self.dtype = name, device, dtype
        self.network = frozen(network, device, dtype)
        self.process = process
        self.scheduler_config = process.scheduler_config
        self.guidance = guidance
        self.time_min = process.time_min
        self.sigma_min, self.sigma_max = process.sigma_min, process.sigma_max

    def compile_network(self, backend: str = "inductor") -> None:
        """Have the network compiled by torch, anew for each shape that it is asked at: minutes first, then faster."""
        self.network.compile(dynamic=False, backend=backend)

    def sigma_of_time(self, time: Tensor) -> Tensor:
        """The noise level (float64) at a model time in [time_min, 1]."""
        return self.process.sigma_of_time(time)

    def denoise(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """The estimate D(x, sigma) of the clean latents; see `Denoiser.denoise` for shapes."""
        levels = sigma.to(torch.float64).expand(len(x))
        z = self.process.network_input(x, levels).to(self.dtype)
        # Half precision cannot tell step 998 from 998.3.
        wide = torch.promote_types(x.dtype, torch.float32)
        times = self.process.network_time(levels).to(self.device, wide, non_blocking=True)
        scales = guidance
        if scales is None:
            scales = torch.full([len(x)], conditioning.guidance_scale, dtype=torch.float64)
        if self.guidance is GuidanceKind.CLASSIFIER_FREE:
            prediction = self._guided(z, times, conditioning, scales, x.dtype)
        else:
            self.check_guidance(scales)
            scales = scales.to(self.device, torch.float32, non_blocking=True)
            prediction = self._predict(z, times, conditioning.rows(len(z)), scales).to(x.dtype)
        return self.process.estimate(x, levels, prediction)

    @abstractmethod
    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        """One call of the network, for z [N, C, H, W] in `dtype` at times [N], with the text of N rows.

        scales: [N], float32, for a network that is told the guidance scale; others are given None.
        """

    def _guided(
        self, z: Tensor, times: Tensor, conditioning: Conditioning, scales: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The prediction under classifier-free guidance, in `dtype`; both halves in one call of the network.

        Of rows at scale 1 there is no unconditional half. Which they are is seen on the host, where the scales are.
        """
        guided = (scales != 1).nonzero().flatten()
        text = conditioning.rows(len(z), unconditional=len(guided))
        if len(guided) == 0:
            return self._predict(z, times, text, None).to(dtype)
        rows = guided.to(z.device, non_blocking=True)
        both = self._predict(torch.cat([z[rows], z]), torch.cat([times[rows], times]), text, None).to(dtype)
        without, prediction = both.split([len(guided), len(z)])
        with_text = prediction[rows]
        return prediction.index_copy(0, rows, without + per_row(scales[guided], both) * (with_text - without))

    def check_guidance(self, scales: float | Tensor, negative_prompt: str | None = None) -> None:
        """Raise `InputError` where the model is asked for guidance of a kind that it does not have."""
        if negative_prompt and self.guidance is not GuidanceKind.CLASSIFIER_FREE:
            raise InputError(
                f"Model {self.name} has no classifier-free guidance (its guidance is {self.guidance.value}), so a "
                "negative prompt does nothing: leave it out."
            )
        if self.guidance is GuidanceKind.NONE and bool((torch.as_tensor(scales) != 1).any()):
            raise InputError(f"Model {self.name} has no guidance: its guidance scale must be 1 everywhere.")


def frozen(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """The module on the device, in `dtype`, in evaluation mode, its weights without gradients.

    In float16 the layers that its own library says overflow there stay in float32 (T5's are such).
    """
    wide = _kept_wide(module, dtype)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, torch.float32 if id(tensor) in wide else dtype)

    module = module._apply(moved).eval().requires_grad_(False)
    if device.type in ("cuda", "cpu"):  # the layout in which their convolutions are fastest
        nn.Module.to(module, memory_format=torch.channels_last)
    return module


def _kept_wide(module: nn.Module, dtype: torch.dtype) -> set[int]:
    """The weights, by identity, that stay in float32 where the others are in `dtype`."""
    names = getattr(module, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None
    layers = [layer for name, layer in module.named_modules() if name.rpartition(".")[2] in (names or ())]
    return {id(weight) for layer in layers for weight in layer.parameters()}


def bytes_to_move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Memory that `frozen` will take on the device for a module's weights, less what is there as it shall be."""
    wide = _kept_wide(module, dtype)
    wanted = [(weight, torch.float32 if id(weight) in wide else dtype) for weight in module.parameters()]
    return sum(
        weight.numel() * to.itemsize
        for weight, to in wanted
        if weight.device != device or weight.dtype != to or _is_laid_out_anew(weight)
    )


def _is_laid_out_anew(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous(memory_format=torch.channels_last)
