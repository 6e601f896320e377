"""What a model needs, before a machine is rented for it: parameters, operations, memory, and on what it fits.

    python -m benchmarks.budget --model sd3

From configurations alone: every module lies on torch's meta device, which holds shapes and no numbers.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from errors import InputError, shows_input_errors
from models.backbone import Backbone, Pipeline
from models.denoiser import Denoiser
from models.loading import described, quiet_and_repeatable, read_json
from models.options import ModelOptions
from models.pipelines import SCHEDULER, contents_of
from models.registry import SOURCE

META = torch.device("meta")
CONFIGURATIONS = SOURCE / "pipelines"
KNOWN = ("sd15", "sdxl", "sd3", "flux")
TYPES = (torch.float32, torch.bfloat16)
MEMORIES = (8, 12, 16, 24, 32, 48, 80, 141)  # GiB of the GPUs that there are
SPARE = 1.5e9  # bytes that the driver, its libraries and the gaps between tensors take
PIXELS = click.IntRange(1, 2**14)


@dataclass(frozen=True)
class Work:
    """One call: floating-point operations (a multiply-add is two), and the most bytes that it holds beside weights."""

    operations: int
    memory: int


@dataclass(frozen=True)
class Budget:
    """What a model needs in one number type.

    parameters: of each part, by the name of its folder. text: for a prompt. row: for a row of the network. decoding:
    for an image.
    """

    dtype: torch.dtype
    parameters: Mapping[str, int]
    text: Work
    row: Work
    decoding: Work

    def weights(self, *, text: bool) -> int:
        """Bytes of the weights; with those of the text encoders, or without."""
        counts = (count for part, count in self.parameters.items() if text or not part.startswith("text_encoder"))
        return self.dtype.itemsize * sum(counts)

    def rows_in(self, memory: float, *, text: bool) -> int:
        """How many rows of the network go through at once in a memory of so many bytes; 0 where the model is too much.

        Images are decoded one by one.
        """
        left = memory - self.weights(text=text)
        return int(left // self.row.memory) if left >= self.decoding.memory else 0


class MostHeld(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at once."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known`: tensors that do not count, since they are there already."""
        super().__init__()
        self.now = self.most = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked, and count the storages of the results that are new."""
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class FusedAttention(TorchFunctionMode):
    """Attention that never holds all pairs of tokens, as the kernels of GPUs: of its output only the shape is right."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The empty output of an attention; everything else as it is."""
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, _, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


class Blank:
    """A tokenizer that knows no word: every text is as many zeros as it is asked for."""

    model_max_length = 77

    def __call__(self, texts: str | list[str], *, max_length: int = 1, **_options: Any) -> SimpleNamespace:
        """Tokens [N, max_length]."""
        count = 1 if isinstance(texts, str) else len(texts)
        return SimpleNamespace(input_ids=torch.zeros(count, max_length, dtype=torch.long))

    def num_special_tokens_to_add(self) -> int:
        """It has no marks."""
        return 0


def loaded(
    folder: Path, options: ModelOptions, dtype: torch.dtype, device: torch.device = META
) -> tuple[Denoiser, dict[str, nn.Module]]:
    """The model that a pipeline's configurations describe, and its parts; elsewhere than on meta with random weights.

    Raises InputError where they describe none that is known.
    """
    contents = contents_of(folder, options)
    with quiet_and_repeatable():
        with device:
            modules = {part: described(kind, folder / part).to(dtype) for part, kind in contents.modules.items()}
        pipeline = Pipeline(
            source=folder,
            modules=modules,
            tokenizers={part: Blank() for part in contents.tokenizers},
            scheduler=read_json(folder / SCHEDULER),
            scheduler_file=folder / SCHEDULER,
            index=contents.index,
            options=options,
        )
        parts = contents.family.assembled(pipeline)
    family: type[Backbone] = contents.family
    return family(folder.name, parts, device=device, dtype=dtype), modules


def budget_of(denoiser: Denoiser, modules: Mapping[str, nn.Module]) -> Budget:
    """Count and measure a model that `loaded` gave, called as when it draws."""
    weights = [weight for module in modules.values() for weight in (*module.parameters(), *module.buffers())]
    texts = itertools.count()

    def encode() -> object:  # a prompt is encoded once
        return denoiser.encode([str(next(texts)) if denoiser.takes_prompts else ""], 1.0)

    conditioning, latents = encode(), torch.zeros(1, *denoiser.latent_shape, device=META)
    level = torch.tensor(denoiser.sigma_max, dtype=torch.float64)
    return Budget(
        dtype=denoiser.dtype,
        parameters={part: sum(map(Tensor.numel, module.parameters())) for part, module in modules.items()},
        text=_measured(encode, weights),
        row=_measured(lambda: denoiser.denoise(latents, level, conditioning), weights),
        decoding=_measured(lambda: denoiser.decode(latents), weights),
    )


@torch.no_grad()
def _measured(call: Callable[[], object], weights: Iterable[Tensor]) -> Work:
    # The plain attention is counted: the fused kernels of some devices are unknown to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    with FusedAttention(), MostHeld(weights) as held:
        call()
    return Work(counter.get_total_flops(), held.most)


def report(denoiser: Denoiser, budgets: list[Budget]) -> Iterator[str]:
    """For people, one fact a line."""
    first = budgets[0]
    height, width = denoiser.image_size
    yield f"{denoiser.name}: images of {height} x {width} pixels, latents {denoiser.latent_shape}"
    yield "\nparameters"
    for part, count in first.parameters.items():
        yield f"  {part:<16}{count:>16,}"
    yield f"  {'all':<16}{sum(first.parameters.values()):>16,}"
    guided = 2 if denoiser.guidance.doubles else 1
    yield "\noperations"
    yield f"  a step (one evaluation): {_tera(first.row)} TFLOP" + (
        f", {_tera(first.row, guided)} under guidance (two rows of the network)" if guided == 2 else ""
    )
    yield f"  an image is decoded by {_tera(first.decoding)} TFLOP, a prompt read by {_tera(first.text)}, once"
    yield f"\n{'memory':<18}" + "".join(f"{_name(budget.dtype):>16}" for budget in budgets)
    for what, size_of in {
        "weights": lambda budget: budget.weights(text=True),
        "  without text": lambda budget: budget.weights(text=False),
        "one row": lambda budget: budget.row.memory,
        "one decoding": lambda budget: budget.decoding.memory,
    }.items():
        sizes = (f"{size_of(budget) / 1e9:.1f} GB" for budget in budgets)
        yield f"  {what:<16}" + "".join(f"{size:>16}" for size in sizes)
    yield "\nrows at once (an image under way is a row for each point of a table" + (
        ", two under guidance)" if guided == 2 else ")"
    )
    for memory in MEMORIES:
        free = memory * 2**30 - SPARE
        yield f"  {memory:>4} GB  " + "".join(f"{_rows(budget, free):<38}" for budget in budgets).rstrip()


def _tera(work: Work, times: int = 1) -> str:
    return f"{times * work.operations / 1e12:.3g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(budget: Budget, memory: float) -> str:
    if with_text := budget.rows_in(memory, text=True):
        return f"{_name(budget.dtype)}: {with_text}"
    if without := budget.rows_in(memory, text=False):
        return f"{_name(budget.dtype)}: {without} with --text-on-cpu"
    return f"{_name(budget.dtype)}: does not fit"


@click.command(epilog="Example:  python -m benchmarks.budget --model flux --height 512 --width 512")
@click.option("--model", required=True, help=f"{', '.join(KNOWN)}, or the folder of a pipeline.")
@click.option("--height", type=PIXELS, help="Of the images, in pixels. [the model's own]")
@click.option("--width", type=PIXELS, help="Of the images, in pixels. [the model's own]")
@click.option("--without-t5", is_flag=True, help="Leave T5 out, where the model can do without it (SD3).")
@shows_input_errors
def main(model: str, height: int | None, width: int | None, without_t5: bool) -> None:
    """Print what a model needs and on what it fits, from its configurations alone. The memories are estimates."""
    folder = CONFIGURATIONS / model if model in KNOWN else Path(model)
    if not folder.is_dir():
        raise InputError(f"--model {model}: there is no such folder; give a pipeline's, or one of {', '.join(KNOWN)}")
    options = ModelOptions(height=height, width=width, without_t5=without_t5)
    models = [loaded(folder, options, dtype) for dtype in TYPES]
    for line in report(models[0][0], [budget_of(*one) for one in models]):
        click.echo(line)


if __name__ == "__main__":
    main()
