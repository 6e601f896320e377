"""What every frozen network that is used as a `Denoiser` has in common: guidance, noise levels, type, memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from errors import InputError
from models.denoiser import Conditioning, Guidance, GuidanceKind, Text
from models.loading import LARGEST_SIDE, guidance_scale_in
from models.options import AS_IT_IS, ModelOptions
from models.processes import Process, per_row
from models.upsampling import double_by_copies

Module = TypeVar("Module", bound=nn.Module)

COMPILED = Path("outputs/compiled")
"""Where compiled code is kept, unless TORCHINDUCTOR_CACHE_DIR names another folder: the next process starts with it."""
GRAPHED_ROWS = 16
"""Of so few rows a GPU is done before the host has launched the next kernel; a CUDA graph launches all at once."""

FEW_PIXELS = 256
"""Up to so many, torch normalises groups of half-precision channels one number at a time on a CPU."""


def code_files(*modules: str) -> tuple[Path, ...]:
    """The source files of modules of this room, such as `families.stable_diffusion`."""
    return tuple(Path(__file__).parent / f"{module.replace('.', '/')}.py" for module in modules)


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline is made of, as it comes from its files: modules on the CPU, in the type they were stored in.

    source: for messages. modules, tokenizers: by the names of their folders. scheduler: the content of scheduler_file.
    index: that of model_index.json. options: what was asked for.
    """

    source: Path
    modules: Mapping[str, nn.Module]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    scheduler: Mapping[str, Any]
    scheduler_file: Path
    index: Mapping[str, Any]
    options: ModelOptions = AS_IT_IS

    @property
    def network(self) -> nn.Module:
        """What denoises; every family names it first."""
        return next(iter(self.modules.values()))


class Backbone(ABC):
    """A network with the process that it undoes; frozen, in evaluation mode.

    The network computes in `dtype`; guidance and the estimate D are formed in x's dtype, the noise levels in float64.

    Attributes of a family:
        backend: see `Denoiser`.
        modules, tokenizers: the parts of its pipeline's folder, and what each is.
        optional: a text encoder that a pipeline may do without, and its tokenizer.
        known_options: those of `ModelOptions` that it can do.
        usual_guidance: of its models.
        half: the half precision that they are used in.
        takes_prompts: see `Denoiser`.
    """

    backend: ClassVar[str]
    modules: ClassVar[Mapping[str, type[nn.Module]]]
    tokenizers: ClassVar[Mapping[str, type[PreTrainedTokenizerBase]]] = MappingProxyType({})
    optional: ClassVar[Mapping[str, str]] = MappingProxyType({})
    known_options: ClassVar[frozenset[str]]
    usual_guidance: ClassVar[Guidance]
    takes_prompts: ClassVar[bool] = True
    half: ClassVar[torch.dtype] = torch.float16
    code = code_files(
        "additions",
        "backbone",
        "checkpoints",
        "loading",
        "noise_levels",
        "options",
        "pictures",
        "pipelines",
        "processes",
        "upsampling",
    )

    def __init__(
        self,
        name: str,
        network: nn.Module,
        process: Process,
        guidance: Guidance,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`network` is moved to the device: see `frozen`."""
        self.name, self.device, self.dtype = name, device, dtype
        self.network = frozen(network, device, dtype)
        self.process = process
        self.scheduler_config = process.scheduler_config
        self.guidance, self.default_guidance_scale = guidance
        self.time_min = process.time_min
        self.sigma_min, self.sigma_max = process.sigma_min, process.sigma_max
        self._row_counts: tuple[int, ...] = ()
        self._graphed = False

    @classmethod
    @abstractmethod
    def assembled(cls, pipeline: Pipeline) -> object:
        """The parts of a pipeline of this family, for its constructor, seen to fit each other.

        Raises `InputError` where they do not, and where they cannot be used here.
        """

    @classmethod
    def check_options(cls, options: ModelOptions, source: Path) -> None:
        """Raise `InputError` where the options ask for what the family cannot do; `source` is the model's place."""
        if unknown := [name for name in options.changes() if name not in cls.known_options]:
            raise InputError(
                f"{source}: a model of the family {cls.backend} takes no {', '.join(unknown)}: leave it out."
            )

    @classmethod
    def guidance_of(cls, folder: Path) -> Guidance:
        """The guidance of the model in a pipeline's folder, or single file: its family's, at the scale that it names.

        Raises `InputError` where that is no finite number of at least 0.
        """
        usual, named = cls.usual_guidance_of(folder), guidance_scale_in(folder)
        return usual if named is None else usual._replace(usual_scale=named)

    @classmethod
    def usual_guidance_of(cls, folder: Path) -> Guidance:
        """The same where the folder names no scale of its own."""
        return cls.usual_guidance

    def compile_network(self, rows: Collection[int] = (), backend: str = "inductor") -> None:
        """Have the network compiled by torch: minutes first, then faster; on CUDA as a graph up to `GRAPHED_ROWS`.

        rows: the numbers of rows that it is asked at from now on: what is more goes in parts, and what is fewer is
        filled up. Without them it is compiled anew for every number that comes.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED.absolute()))
        self._row_counts = tuple(sorted(rows))
        self._graphed = self.device.type == "cuda" and 0 < max(rows, default=0) <= GRAPHED_ROWS
        mode = "reduce-overhead" if self._graphed else None
        double_by_copies(self.network)
        self.network.compile(dynamic=False, backend=backend, mode=mode)

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
            prediction = self._predicted(z, times, conditioning.rows(len(z)), scales).to(x.dtype)
        return self.process.estimate(x, levels, prediction)

    def _predict(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        """One call of the network, for z [N, C, H, W] in `dtype` at times [N], with the text of N rows.

        scales: [N], float32, for a network that is told the guidance scale; others are given None.
        """
        return self.network(z, timestep=times, **text, return_dict=False)[0]

    def _predicted(self, z: Tensor, times: Tensor, text: Text, scales: Tensor | None) -> Tensor:
        """`_predict`, by a network that was compiled for some numbers of rows at no others."""
        if not self._row_counts:
            return self._predict(z, times, text, scales)
        predictions = []
        for start in range(0, len(z), self._row_counts[-1]):
            part = slice(start, start + self._row_counts[-1])
            count = len(z[part])
            rows = next(rows for rows in self._row_counts if rows >= count)
            given = {name: _filled(tensor[part], rows) for name, tensor in text.items()}
            told = None if scales is None else _filled(scales[part], rows)
            if self._graphed:
                torch.compiler.cudagraph_mark_step_begin()
            predicted = self._predict(_filled(z[part], rows), _filled(times[part], rows), given, told)
            # A copy: a CUDA graph writes its next answer over this one.
            predictions.append(predicted[:count].clone())
        return torch.cat(predictions)

    def _guided(
        self, z: Tensor, times: Tensor, conditioning: Conditioning, scales: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The prediction under classifier-free guidance, in `dtype`; both halves in one call of the network.

        Of rows at scale 1 there is no unconditional half. Which they are is seen on the host, where the scales are.
        """
        guided = (scales != 1).nonzero().flatten()
        text = conditioning.rows(len(z), unconditional=len(guided))
        if len(guided) == 0:
            return self._predicted(z, times, text, None).to(dtype)
        rows = guided.to(z.device, non_blocking=True)
        both = self._predicted(torch.cat([z[rows], z]), torch.cat([times[rows], times]), text, None).to(dtype)
        without, prediction = both.split([len(guided), len(z)])
        with_text = prediction[rows]
        return prediction.index_copy(0, rows, without + per_row(scales[guided], both) * (with_text - without))

    def check_guidance(self, scales: float | Tensor) -> None:
        """Raise `InputError` where the model is asked for guidance of a kind that it does not have."""
        if self.guidance is GuidanceKind.NONE and bool((torch.as_tensor(scales) != 1).any()):
            raise InputError(f"Model {self.name} has no guidance: its guidance scale must be 1 everywhere.")


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """So many rows, contiguous, since the compiler counts strides as shapes: the last one again and again."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])]).contiguous()


def sides(
    pipeline: Pipeline, native: tuple[int, int], *, pixels: int, patch: int = 1, largest: int = LARGEST_SIDE
) -> tuple[int, int]:
    """Height and width of the latents that are to be drawn: what was asked for, else the model's own.

    native: its own, in latents. pixels: of a latent along each side. patch: latents that the network takes together
    along each side. largest: the most that it takes. Raises `InputError` for a size that the model cannot draw.
    """
    asked = (pipeline.options.height, pipeline.options.width)
    found = [own if side is None else side / pixels for own, side in zip(native, asked, strict=True)]
    for name, side in zip(("height", "width"), found, strict=True):
        if side % patch or not 0 < side <= largest:
            raise InputError(
                f"{pipeline.source}: no image of this model has a {name} of {side * pixels:g} pixels; take a multiple "
                f"of {patch * pixels}, at most {largest * pixels}."
            )
    return int(found[0]), int(found[1])


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
    if device.type == "cpu" and dtype.itemsize < torch.float32.itemsize:
        for layer in module.modules():
            if isinstance(layer, nn.GroupNorm):
                _widen(layer, dtype)
    return module


def _widen(layer: nn.GroupNorm, dtype: torch.dtype) -> None:
    """Have a layer between others of `dtype` compute small images in float32.

    In half precision torch's takes longer for these on a CPU than all convolutions of a small network together.
    """
    layer.float()
    layer.register_forward_pre_hook(lambda _, given: given[0].float() if given[0][0, 0].numel() <= FEW_PIXELS else None)
    layer.register_forward_hook(lambda _, given, computed: computed.to(dtype))


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
