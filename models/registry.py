"""The models that have names, and `load_denoiser`, the one way from a name or a path to a `Denoiser`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from errors import InputError
from models import asset_table
from models.asset_table import AssetFile
from models.denoiser import USUAL_GUIDANCE_SCALE, Denoiser, Guidance, GuidanceKind
from models.options import AS_IT_IS, ModelOptions

if TYPE_CHECKING:
    from models.backbone import Backbone

SOURCE = Path(__file__).resolve().parent.parent / "src"
# Component configurations and tokenizer of Stable Diffusion 1.x, which a single file does not carry.
COMPVIS_CONFIGS = "pipelines/sd15"


@dataclass(frozen=True)
class Asset:
    """What a model needs on disk: a path below src/, and its size in bytes (None for a folder)."""

    path: str
    size: int | None

    def __str__(self) -> str:
        """For messages: the path and how large a file is to be expected."""
        return f"src/{self.path}" + (f" ({self.size:,} bytes)" if self.size else "")


def _fetched(file: AssetFile) -> Asset:
    return Asset(file.path.removeprefix("src/"), file.size)


TOKENIZER = tuple(_fetched(file) for file in asset_table.TOKENIZER)
FETCH_TOKENIZER = "Fetch what is missing:  python -m models.assets fetch tokenizer"
FETCH_SD15 = (
    "Fetch what is missing:  python -m models.assets fetch sd15\n"
    "To try things now, use the model that comes with the repository:  shapes"
)


@dataclass(frozen=True)
class RegisteredModel:
    """A model with a name.

    weights: alternatives, the first that is there is used; none of what lies in a hub's cache. companions: all needed
    besides. remedy: what to do when something is missing. prompts: those that it is trained on where nobody names
    others, a path below the repository's root. unknown_words: see `LatentDiffusion`. pipeline: what diffusers loads it
    by: a repository of the hub, or a folder.
    """

    weights: tuple[Asset, ...]
    companions: tuple[Asset, ...]
    remedy: str
    prompts: str
    unknown_words: Callable[[str], list[str]] | None
    pipeline: str


def _words_unknown_to_shapes(prompt: str) -> list[str]:
    from models.shapes.scenes import unknown_words  # the other models do without the world of shapes

    return unknown_words(prompt)


SHAPES_WORLD = ("shapes", "shapes_flow")
"""The models that draw the shapes world, whose captions its verifier reads."""

REGISTERED = {
    **{
        name: RegisteredModel(
            weights=(Asset(name, None),),
            companions=(Asset(f"{name}/model_index.json", None),),
            remedy=f"It is part of the repository:  git checkout -- src/{name}",
            prompts="src/prompts/shapes_train.csv",
            unknown_words=_words_unknown_to_shapes,
            pipeline=str(SOURCE / name),
        )
        for name in SHAPES_WORLD
    },
    "sd15": RegisteredModel(
        weights=(_fetched(asset_table.SD15_SAFETENSORS), _fetched(asset_table.SD15_CKPT)),
        companions=TOKENIZER,
        remedy=FETCH_SD15,
        prompts=asset_table.COCO_PROMPTS.path,
        unknown_words=None,
        pipeline=asset_table.SD15,
    ),
    **{
        name: RegisteredModel(
            weights=(),
            companions=(),
            remedy=f"python -m models.assets fetch {name}",
            prompts=asset_table.COCO_PROMPTS.path,
            unknown_words=None,
            pipeline=hub_id,
        )
        for name, hub_id in asset_table.PIPELINES.items()
    },
}


def usual_prompts(*names: str | None) -> str | None:
    """The prompts that the first registered model among `names` is usually trained on; None where there is none."""
    return next((REGISTERED[name].prompts for name in names if name in REGISTERED), None)


def load_denoiser(
    spec: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    options: ModelOptions = AS_IT_IS,
) -> Denoiser:
    """The model called `spec`, ready on `device`, its modules in `dtype`.

    `spec` is a registered name (`shapes`, `sd15`), a diffusers pipeline folder, the name of such a pipeline on a hub,
    fetched before, or a single .safetensors or .ckpt file of Stable Diffusion 1.x. Nothing is downloaded. Raises
    `InputError` for an unknown name, for files that are missing (each named, with its size and what to do) and for
    files that are not what they should be.
    """
    return _denoiser(str(spec), torch.device(device), dtype, options, torch.device("cpu"))


def _denoiser(
    spec: str, device: torch.device, dtype: torch.dtype, options: ModelOptions, loaded_on: torch.device
) -> Backbone:
    """The model, its modules moved from the device that they are `loaded_on`, which is the CPU or, unread, meta."""
    path, model = found(spec), REGISTERED.get(spec)
    # diffusers and transformers take seconds to import: only where a model is really loaded
    from models.compvis import assemble_compvis, read_compvis
    from models.families.stable_diffusion import StableDiffusion
    from models.pipelines import load_folder

    if path.is_dir():
        own_name = Path(spec).resolve().name
        family, parts = load_folder(path, dtype, options, loaded_on)
    else:
        state, own_name = read_compvis(path), path.stem  # mapped, not yet read
        _check_nothing_missing(f"The tokenizer of {path}", _missing(TOKENIZER), FETCH_TOKENIZER)
        family, parts = StableDiffusion, assemble_compvis(state, path, SOURCE / COMPVIS_CONFIGS, options)
    taught = model and model.unknown_words
    words = {"unknown_words": taught, "captions": model.prompts} if taught else {}
    return family(spec if model else own_name, parts, device=device, dtype=dtype, **words)


class Traits(NamedTuple):
    """What is known of a model before it is loaded; see `Denoiser`."""

    backend: str
    takes_prompts: bool
    guidance: Guidance


def traits_of(spec: str) -> Traits:
    """What the files of a model say of it, without loading it; `InputError` where they are not there."""
    path = found(spec)
    if path.is_file():
        return Traits("ldm", True, Guidance(GuidanceKind.CLASSIFIER_FREE, USUAL_GUIDANCE_SCALE))
    from models.pipelines import contents_of  # with diffusers, which takes seconds to import

    family = contents_of(path).family
    return Traits(family.backend, family.takes_prompts, family.guidance_of(path))


def usual_half(spec: str) -> torch.dtype:
    """The half precision that a model is used in: bfloat16 where its network is stored so, otherwise its family's.

    Stable Diffusion 3 is published in float16, 3.5 in bfloat16. Raises `InputError` where its files are not there.
    """
    path = found(spec)
    if path.is_file():
        return torch.float16
    from models.loading import weights_in
    from models.pipelines import check_pipeline_folder

    contents = check_pipeline_folder(path)
    stored = {tensor.dtype for tensor in weights_in(path / contents.below(contents.network)).values()}
    return torch.bfloat16 if torch.bfloat16 in stored else contents.family.half


def default_guidance_scale(spec: str) -> float:
    """The guidance scale of `load_denoiser(spec)`, without loading it; of a model that is not there, the usual one.

    Raises `InputError` where its files say one that cannot be used.
    """
    try:
        found(spec)
    except InputError:
        return USUAL_GUIDANCE_SCALE
    return traits_of(spec).guidance.usual_scale


def is_unconditional(spec: str | None) -> bool:
    """Whether the files of a model say that it takes no prompts; False where they are not there."""
    try:
        return spec is not None and not traits_of(spec).takes_prompts
    except InputError:
        return False


def check_assets(spec: str, options: ModelOptions = AS_IT_IS) -> Denoiser:
    """What `load_denoiser` gives, on torch's meta device, which holds shapes and no numbers: nothing can be drawn.

    It has been seen to be whole, its parts to fit each other, and it validates prompts; of folders no weights are read.
    Raises `InputError` as `load_denoiser` does.
    """
    meta = torch.device("meta")
    return _denoiser(spec, meta, torch.float32, replace(options, text_on_cpu=False), meta)


def found(spec: str) -> Path:
    """The file or folder with the model's weights; `InputError` where anything that it needs is not there."""
    model = REGISTERED.get(spec)
    if model is None or not model.weights:
        return locate(spec)
    there = [file for asset in model.weights if (file := SOURCE / asset.path).exists()]
    weights = [] if there else [", or ".join(map(str, model.weights))]
    _check_nothing_missing(f"Model {spec}", [*weights, *_missing(model.companions)], model.remedy)
    return there[0]


def locate(spec: str) -> Path:
    """The file or folder that `spec` names: a path, or a hub's pipeline in its cache on this machine.

    Raises `InputError` where there is none.
    """
    hub_id = asset_table.PIPELINES.get(spec, spec)
    if hub_id == spec and Path(spec).exists():
        return Path(spec)
    if not asset_table.HUB_ID.fullmatch(hub_id):
        raise InputError(_unknown_message(spec))
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        if spec in REGISTERED:
            raise InputError(
                f"Model {spec} ({hub_id}) was not fetched to this machine. Fetch it:  {REGISTERED[spec].remedy}"
            ) from None
        raise InputError(
            f"Model {spec!r} is neither a registered name ({', '.join(REGISTERED)}) nor a file or folder that exists, "
            f"nor a hub's pipeline that was fetched. To fetch it:  python -m models.assets fetch {spec}"
        ) from None


def pipeline_of(spec: str) -> str:
    """What `DiffusionPipeline.from_pretrained` loads the model called `spec` by: a folder, or a hub's repository.

    Raises `InputError` for a single file, of which nothing says what pipeline it came from.
    """
    if spec in REGISTERED:
        return REGISTERED[spec].pipeline
    if Path(spec).is_file():
        raise InputError(
            f"{spec}: is a single file; name the pipeline that diffusers shall load, a folder or OWNER/NAME"
        )
    return str(Path(spec).resolve()) if Path(spec).is_dir() else spec


def _missing(assets: Sequence[Asset]) -> list[str]:
    return [str(asset) for asset in assets if not (SOURCE / asset.path).exists()]


def _check_nothing_missing(what: str, missing: Sequence[str], remedy: str) -> None:
    if missing:
        lines = "\n".join(f"  {item}" for item in missing)
        raise InputError(f"{what} needs files that are not there:\n{lines}\n{remedy}")


def _unknown_message(spec: str) -> str:
    nearest = difflib.get_close_matches(spec, REGISTERED, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return (
        f"Model {spec!r} is neither a registered name ({', '.join(REGISTERED)}) nor a file or folder that exists."
        f"{hint} A pipeline of a hub is named OWNER/NAME and fetched first:  python -m models.assets fetch OWNER/NAME"
    )
