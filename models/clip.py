"""CLIP models (Radford et al., arXiv 2103.00020) in open_clip's checkpoint layout, held as `transformers.CLIPModel`.

Preference rewards such as HPS v2.1 (arXiv 2306.09341) are published in that layout. It maps one to one onto
`transformers.CLIPModel`, so scoring needs neither open_clip nor torchvision.

A model is described by an open_clip style configuration, `model_cfg`:

    {"embed_dim": 1024, "quick_gelu": false,
     "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1280, "layers": 32, "head_width": 80,
                    "mlp_ratio": 4.0},
     "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24,
                  "mlp_ratio": 4.0}}

`quick_gelu` (false) and `mlp_ratio` (4.0) may be left out. The end-of-text token, at which text is pooled, is the last
one of the vocabulary: open_clip pools where the token id is largest.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from errors import InputError, first_line
from models.checkpoints import read_state_dict, read_weights, write_archive
from models.devices import check_memory, to_device
from models.skeletons import skeleton

VIT_H_14 = Path(__file__).resolve().parent.parent / "src" / "pipelines" / "clip" / "ViT-H-14.json"

# Mean and standard deviation of CLIP's training images, per RGB channel in [0, 1] (Radford et al., released code).
WORDS = re.compile(r"[^\W\d_]{3,}")  # shorter ones, "a" or "on", say nothing of what is to be seen
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_REQUIRED = {
    "": {"embed_dim", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
_OPTIONAL = {"": {"quick_gelu"}, "vision_cfg": {"mlp_ratio"}, "text_cfg": {"mlp_ratio"}}
_LISTED_KEYS = 12
LARGEST_COUNT = 2**24  # of anything in a configuration; vocabularies have some 50,000 entries


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def clip_config(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """Translate an open_clip style configuration (see the module's docstring) to a `transformers.CLIPConfig`.

    Raises:
        InputError: a key is missing or unknown, or a value does not fit; all faults are named at once.
    """
    _check_keys(model_cfg)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    faults = _wrong_values(model_cfg) or _misfits(vision, text)
    if faults:
        raise InputError("The CLIP configuration does not fit: " + "; ".join(faults) + ".")
    end_of_text = text["vocab_size"] - 1

    def tower(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden_size": section["width"],
            "intermediate_size": int(section["width"] * section.get("mlp_ratio", 4.0)),
            "num_hidden_layers": section["layers"],
            "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
            "projection_dim": model_cfg["embed_dim"],
        }

    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config={
            **tower(vision),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "num_attention_heads": vision["width"] // vision["head_width"],
        },
        text_config={
            **tower(text),
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "num_attention_heads": text["heads"],
            "pad_token_id": 0,
            "bos_token_id": end_of_text - 1,
            "eos_token_id": end_of_text,
        },
    )


def new_clip(model_cfg: Mapping[str, Any]) -> CLIPModel:
    """Make a CLIP model with fresh weights from torch's global generator (float32, CPU, in training mode)."""
    return CLIPModel(clip_config(model_cfg)).train()


def _check_keys(model_cfg: Mapping[str, Any]) -> None:
    faults: list[str] = []
    for section, required in _REQUIRED.items():
        content = model_cfg.get(section, {}) if section else model_cfg
        if not isinstance(content, Mapping):
            faults.append(f"{section} must be an object, not {content!r}")
            continue
        prefix = f"{section}." if section else ""
        faults += [f"{prefix}{key} is missing" for key in sorted(required - content.keys())]
        faults += [f"{prefix}{key} is unknown" for key in sorted(content.keys() - required - _OPTIONAL[section])]
    if faults:
        raise InputError("The CLIP configuration (model_cfg) is wrong: " + "; ".join(faults) + ".")


def _wrong_values(model_cfg: Mapping[str, Any]) -> list[str]:
    counts = {"embed_dim": model_cfg["embed_dim"]}
    for section in ("vision_cfg", "text_cfg"):
        counts |= {f"{section}.{key}": model_cfg[section][key] for key in sorted(_REQUIRED[section])}
    faults = [
        f"{name} must be a positive whole number, not {value!r:.40}; at most {LARGEST_COUNT}"
        for name, value in counts.items()
        if type(value) is not int or not 1 <= value <= LARGEST_COUNT
    ]
    for section in ("vision_cfg", "text_cfg"):
        ratio = model_cfg[section].get("mlp_ratio", 4.0)
        if not isinstance(ratio, int | float) or not 0 < ratio < LARGEST_COUNT:
            faults.append(f"{section}.mlp_ratio must be a positive number, not {ratio!r:.40}")
    if not isinstance(model_cfg.get("quick_gelu", False), bool):
        faults.append(f"quick_gelu must be true or false, not {model_cfg['quick_gelu']!r}")
    return faults


def _misfits(vision: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    divisions = [
        ("vision_cfg.width", vision["width"], "vision_cfg.head_width", vision["head_width"]),
        ("vision_cfg.image_size", vision["image_size"], "vision_cfg.patch_size", vision["patch_size"]),
        ("text_cfg.width", text["width"], "text_cfg.heads", text["heads"]),
    ]
    return [f"{name}={a} is no multiple of {other}={b}" for name, a, other, b in divisions if a % b]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint layout


class _Entry(NamedTuple):
    """One tensor of the open_clip layout and where it lives in `transformers.CLIPModel`."""

    open_clip: str
    ours: tuple[str, ...]  # three for query, key, value, which open_clip stacks along the first dimension
    transposed: bool = False


def _layout(config: CLIPConfig) -> list[_Entry]:
    entries = [
        _Entry("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
        _Entry("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
        _Entry("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        _Entry("visual.proj", ("visual_projection.weight",), transposed=True),
        _Entry("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        _Entry("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        _Entry("text_projection", ("text_projection.weight",), transposed=True),
        _Entry("logit_scale", ("logit_scale",)),
        *_linear("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_linear("visual.ln_post", "vision_model.post_layernorm"),
        *_linear("ln_final", "text_model.final_layer_norm"),
    ]
    for index in range(config.vision_config.num_hidden_layers):
        entries += _block(f"visual.transformer.resblocks.{index}", f"vision_model.encoder.layers.{index}")
    for index in range(config.text_config.num_hidden_layers):
        entries += _block(f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}")
    return entries


def _linear(open_clip: str, ours: str) -> list[_Entry]:
    return [_Entry(f"{open_clip}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias")]


def _block(open_clip: str, ours: str) -> list[_Entry]:
    stacked = [
        _Entry(f"{open_clip}.attn.in_proj_{part}", tuple(f"{ours}.self_attn.{name}_proj.{part}" for name in "qkv"))
        for part in ("weight", "bias")
    ]
    return [
        *stacked,
        *_linear(f"{open_clip}.attn.out_proj", f"{ours}.self_attn.out_proj"),
        *_linear(f"{open_clip}.ln_1", f"{ours}.layer_norm1"),
        *_linear(f"{open_clip}.ln_2", f"{ours}.layer_norm2"),
        *_linear(f"{open_clip}.mlp.c_fc", f"{ours}.mlp.fc1"),
        *_linear(f"{open_clip}.mlp.c_proj", f"{ours}.mlp.fc2"),
    ]


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """Return the model's weights under open_clip's names and shapes (detached; some share memory with the model)."""
    weights = model.state_dict()
    renamed = {}
    for entry in _layout(model.config):
        tensor = torch.cat([weights[name] for name in entry.ours]) if len(entry.ours) > 1 else weights[entry.ours[0]]
        renamed[entry.open_clip] = tensor.T if entry.transposed else tensor
    return renamed


def from_open_clip(state_dict: Mapping[str, Tensor], model_cfg: Mapping[str, Any], *, source: str) -> CLIPModel:
    """Make a CLIP model (float32, CPU, in evaluation mode) of weights in open_clip's layout; they are copied.

    Args:
        state_dict: tensors of any floating-point type under open_clip's names.
        model_cfg: the open_clip style configuration that they must fit.
        source: what messages call the weights: the file that they come from.

    Raises:
        InputError: tensors are missing, left over or of another shape; each is listed. Or there is too little memory.
    """
    config = clip_config(model_cfg)
    model = _without_memory(config, state_dict, source)
    layout = _layout(config)
    expected = {name: tuple(tensor.shape) for name, tensor in to_open_clip(model).items()}
    _check_tensors(state_dict, expected, source)
    weights: dict[str, Tensor] = {}
    for entry in layout:
        parts = _split(entry, state_dict[entry.open_clip].detach().to("cpu", torch.float32))
        # Copies: the file stays mapped into memory otherwise, and parts of one stacked tensor would share storage.
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        weights |= dict(zip(entry.ours, copies, strict=True))
    return _filled(model, weights)


def load_transformers_checkpoint(folder: Path) -> CLIPModel:
    """Read a CLIP model that transformers wrote, config.json and its weights (float32, CPU, evaluation mode).

    PickScore and OpenAI's CLIP are published so: as model.safetensors, or where that is not there pytorch_model.bin.

    Raises:
        InputError: a file is missing or malformed, is of another kind of model, or its tensors do not fit the
            configuration; each is listed. Or there is too little memory.
    """
    published = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights_file = next((file for file in published if file.is_file()), published[0])
    absent = [name for name in ("config.json", weights_file.name) if not (folder / name).is_file()]
    if absent:
        raise InputError(f"There is no CLIP model in {folder}: {' and '.join(absent)} missing.")
    try:
        kind = CLIPConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        config = CLIPConfig.from_pretrained(folder, local_files_only=True) if kind == "clip" else None
    except Exception as error:  # what a configuration makes the library trip over can be anything
        raise InputError(f"{folder / 'config.json'} is no readable configuration: {first_line(error)}") from error
    if config is None:
        raise InputError(f"{folder / 'config.json'} describes a model of kind {kind!r}, not 'clip'.")
    return from_transformers(read_weights(weights_file), config, source=str(weights_file))


def from_transformers(state_dict: Mapping[str, Tensor], config: CLIPConfig, *, source: str) -> CLIPModel:
    """Make a CLIP model (float32, CPU, in evaluation mode) of tensors under transformers' names.

    Raises:
        InputError: tensors are missing, left over or of another shape; each is listed. Or there is too little memory.
    """
    # Older files carry along the numbers 0, 1, 2, ... of the positions.
    state = {name: weight for name, weight in state_dict.items() if "position_ids" not in name}
    model = _without_memory(config, state, source)
    _check_tensors(state, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, source)
    return _filled(model, {name: weight.to(torch.float32) for name, weight in state.items()})


def _without_memory(config: CLIPConfig, weights: Mapping[str, Tensor], source: str) -> CLIPModel:
    """A model of this size, for which there is memory in float32; none is taken for weights that are replaced at once.

    Raises InputError where the configuration is of no model, or of one for which there is too little memory.
    """
    try:
        model = skeleton(lambda: CLIPModel(config), weights)
    except Exception as error:  # what a configuration makes the library trip over can be anything
        raise InputError(f"{source} holds no CLIP model of the configured size: {first_line(error)}") from error
    needed = sum(weight.numel() for weight in model.parameters()) * torch.float32.itemsize
    check_memory(source, needed, torch.device("cpu"))
    return model


def _filled(model: CLIPModel, weights: Mapping[str, Tensor]) -> CLIPModel:
    """The model, built without memory of its own, with these weights."""
    model.load_state_dict(weights, strict=True, assign=True)
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        # The one kind of tensor that no checkpoint holds, and that is therefore still without memory.
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.eval()


def _split(entry: _Entry, tensor: Tensor) -> Sequence[Tensor]:
    tensor = tensor.T if entry.transposed else tensor
    return tensor.chunk(len(entry.ours)) if len(entry.ours) > 1 else (tensor,)


def _check_tensors(state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    missing = [name for name in expected if name not in state_dict]
    extra = [name for name in state_dict if name not in expected]
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    misshapen = [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = [("missing", missing), ("left over", extra), ("of another shape", misshapen)]
    found = [f"{len(names)} {what}: {_list(names)}" for what, names in faults if names]
    if found:
        raise InputError(
            f"{source} is no CLIP checkpoint of the configured size: of {len(expected)} tensors expected, "
            + "; ".join(found)
            + "."
        )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED_KEYS])
    return shown if len(names) <= _LISTED_KEYS else f"{shown} and {len(names) - _LISTED_KEYS} more"


def load_open_clip_checkpoint(path: Path | str, model_cfg: Mapping[str, Any]) -> CLIPModel:
    """Read a checkpoint in open_clip's layout into a CLIP model (float32, CPU, in evaluation mode).

    The file (.pt, .ckpt or .safetensors) holds the tensors themselves or has them under `state_dict`; see
    `read_state_dict`. No code from the file is run.

    Raises:
        InputError: the file is missing or cannot be read, or its tensors do not fit `model_cfg`; each is listed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint at {path}.")
    return from_open_clip(read_state_dict(path), model_cfg, source=str(path))


def save_open_clip_checkpoint(model: CLIPModel, path: Path | str, dtype: torch.dtype = torch.float16) -> None:
    """Write the model's weights to `path` as `{"state_dict": ...}` in open_clip's layout, in the given type.

    It appears whole or not at all.
    """
    path = Path(path)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in to_open_clip(model).items()}
    write_archive(path, {"state_dict": weights})


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and features


def preprocess(images: Tensor, image_size: int, *, whole: bool = False) -> Tensor:
    """Bring images to CLIP's input: shortest side to `image_size`, centre crop, CLIP's mean and deviation per channel.

    The resize is Pillow's bicubic with antialiasing, less its rounding to 8 bits, on the images' device. An image that
    already has the size is only normalised.

    Args:
        images: [N, 3, H, W], RGB in [0, 1].
        image_size: side of the result in pixels.
        whole: nothing is cropped: the longest side to `image_size`, and black bars beside the rest, as HPS has them.

    Returns:
        [N, 3, image_size, image_size], float32.

    Raises:
        ValueError: the images have another number of dimensions or channels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], not {list(images.shape)}")
    images = images.float()
    images = _padded(images, image_size) if whole else _centre_crop(_resize(images, image_size), image_size)
    mean, std = (to_device(torch.tensor(part), images.device)[:, None, None] for part in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def _resize(images: Tensor, shortest: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) == shortest:
        return images
    # The longer side is rounded down, as open_clip's image library does.
    new_height, new_width = max(shortest, shortest * height // width), max(shortest, shortest * width // height)
    # One direction after the other, because Pillow clips what overshoots the range of colours after each.
    for size in ((height, new_width), (new_height, new_width)):
        images = functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def _padded(images: Tensor, longest: int) -> Tensor:
    height, width = (round(side * longest / max(images.shape[-2:])) for side in images.shape[-2:])
    # Not clipped: HPS resizes floating-point numbers.
    images = functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (longest - height) // 2, (longest - width) // 2
    return functional.pad(images, (left, longest - width - left, top, longest - height - top))


def _centre_crop(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top : top + size, left : left + size]


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], context_length: int) -> Tensor:
    """Turn texts into token ids the way open_clip does: start, text, end, then zeros.

    HTML entities are resolved, case and white space are levelled. Of a text that is too long the first
    `context_length - 1` tokens are kept and the end-of-text token closes them. (open_clip also repairs broken Unicode
    and straightens typographic quotes through the package ftfy; that step, without effect on plain text, is left out.)

    Returns:
        int64 [len(texts), context_length].
    """
    rows = tokenizer(_cleaned(texts), truncation=True, max_length=context_length, padding=False)["input_ids"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def number_cut(tokenizer: CLIPTokenizer, texts: Sequence[str], context_length: int) -> int:
    """How many texts `tokenize` cuts."""
    rows = tokenizer(_cleaned(texts), truncation=False, verbose=False)["input_ids"]
    return sum(len(ids) > context_length for ids in rows)


def without_known_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The texts that have words of three letters or more, each of which the tokenizer spells in pieces or has not."""
    words_of = {text: WORDS.findall(read.lower()) for text, read in zip(texts, _cleaned(texts), strict=True)}
    words = sorted({word for words in words_of.values() for word in words})
    rows = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    known = {word for word, ids in zip(words, rows, strict=True) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id}
    return [text for text, words in words_of.items() if words and known.isdisjoint(words)]


def _cleaned(texts: Sequence[str]) -> list[str]:
    return [html.unescape(html.unescape(text)).strip() for text in texts]


def image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embed preprocessed images [N, 3, S, S]: projected features [N, embed_dim], not normalised."""
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def text_features(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Embed token ids [N, L]: projected features [N, embed_dim] at the end-of-text token, not normalised."""
    return model.text_projection(model.text_model(input_ids=tokens).pooler_output)
