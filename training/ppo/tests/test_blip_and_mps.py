"""ImageReward and MPS: small and random, in their published layouts, against forwards of our own in plain torch."""

from __future__ import annotations

import math
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional

from errors import InputError
from models import clip
from models.checkpoints import read_module
from tests.plain_clip import LETTERS, random_plain_clip, write_letter_tokenizer
from training.ppo.rewards import RewardFiles
from training.ppo.rewards.image_reward import DEVIATION, MEAN, ImageReward
from training.ppo.rewards.mps import CONDITION, MPS, RELEVANT

PROMPTS = ["a b", "c", "z y x w"]
MEANS, STDS = (torch.tensor(part)[:, None, None] for part in (clip.IMAGE_MEAN, clip.IMAGE_STD))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """By hand: softmax(q k / sqrt(width)) v, of [N, I, heads * width]; allowed bool [N, J]."""
    q, k, v = (heads_of(part, heads) for part in (queries, keys, values))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, None, :], -math.inf)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v).transpose(1, 2).flatten(2)


# --- ImageReward

VISION, TEXT, SIDE, PATCH = 128, 24, 32, 16  # widths; pixels
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 34,
    "encoder_width": 999,  # of another image half than the one in use, as in the published file
    "add_cross_attention": True,
}


def published_image_reward(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names: an image half of two layers, BLIP's training heads, the head."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, VISION),
        "visual_encoder.pos_embed": (1, 1 + (SIDE // PATCH) ** 2, VISION),
        "visual_encoder.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (VISION,),
        "text_encoder.embeddings.word_embeddings.weight": (MED_CONFIG["vocab_size"], TEXT),
        "text_encoder.embeddings.position_embeddings.weight": (MED_CONFIG["max_position_embeddings"], TEXT),
        "vision_proj.weight": (8, VISION),
        "vision_proj.bias": (8,),
        "text_proj.weight": (8, TEXT),
        "text_proj.bias": (8,),
    }
    linear: dict[str, tuple[int, int]] = {}
    norms = {"visual_encoder.norm": VISION, "text_encoder.embeddings.LayerNorm": TEXT}
    for i in range(2):
        block, layer = f"visual_encoder.blocks.{i}", f"text_encoder.encoder.layer.{i}"
        norms |= {f"{block}.norm1": VISION, f"{block}.norm2": VISION, f"{layer}.output.LayerNorm": TEXT}
        linear |= {f"{block}.attn.qkv": (3 * VISION, VISION), f"{block}.attn.proj": (VISION, VISION)}
        linear |= {f"{block}.mlp.fc1": (2 * VISION, VISION), f"{block}.mlp.fc2": (VISION, 2 * VISION)}
        for part, width in (("attention", TEXT), ("crossattention", VISION)):
            linear |= {f"{layer}.{part}.self.query": (TEXT, TEXT), f"{layer}.{part}.output.dense": (TEXT, TEXT)}
            linear |= {f"{layer}.{part}.self.{name}": (TEXT, width) for name in ("key", "value")}
            norms[f"{layer}.{part}.output.LayerNorm"] = TEXT
        inner = MED_CONFIG["intermediate_size"]
        linear |= {f"{layer}.intermediate.dense": (inner, TEXT), f"{layer}.output.dense": (TEXT, inner)}
    widths = (TEXT, 1024, 128, 64, 16, 1)
    for index, number in enumerate((0, 2, 4, 6, 7)):
        linear[f"mlp.layers.{number}"] = (widths[index + 1], widths[index])
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)
    named = {name if name.startswith("mlp") else f"blip.{name}": tensor for name, tensor in state.items()}
    return {**named, "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


class Plain:
    """BLIP's two halves by hand, from the tensors under their published names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        kernel, bias = (self.state[f"{name}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
        patches = functional.unfold(pixels, PATCH, stride=PATCH).mT @ kernel.flatten(1).T + bias
        first = self.state[f"{name}.cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([first, patches], dim=1) + self.state[f"{name}.pos_embed"]
        for i in range(2):
            block = f"{name}.blocks.{i}"
            q, k, v = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
            x = x + self.linear(attention(q, k, v, VISION // 64), f"{block}.attn.proj")
            y = self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")
            x = x + self.linear(functional.gelu(y), f"{block}.mlp.fc2")
        return self.norm(x, f"{name}.norm", 1e-6)

    def read(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        name = "blip.text_encoder"
        words, places = (self.state[f"{name}.embeddings.{part}_embeddings.weight"] for part in ("word", "position"))
        x = self.norm(words[tokens] + places[: tokens.shape[1]], f"{name}.embeddings.LayerNorm", 1e-12)
        for i in range(2):
            layer = f"{name}.encoder.layer.{i}"
            for part, context, allowed in (("attention", None, mask.bool()), ("crossattention", seen, None)):
                source = x if context is None else context
                q, k, v = (
                    self.linear(y, f"{layer}.{part}.self.{which}")
                    for which, y in (("query", x), ("key", source), ("value", source))
                )
                y = self.linear(attention(q, k, v, 3, allowed), f"{layer}.{part}.output.dense")
                x = self.norm(x + y, f"{layer}.{part}.output.LayerNorm", 1e-12)
            y = self.linear(functional.gelu(self.linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = self.norm(x + y, f"{layer}.output.LayerNorm", 1e-12)
        return x[:, 0]

    def reward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.read(tokens, mask, self.see(pixels))
        for number in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{number}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_bert_tokenizer(folder: Path) -> Path:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, the letters from 4 on, as bert-base-uncased's tokenizer.json is laid out."""
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def image_reward_files(tmp_path: Path) -> tuple[Path, Path]:
    torch.save(published_image_reward(), tmp_path / "ImageReward.pt")
    return tmp_path / "ImageReward.pt", write_bert_tokenizer(tmp_path / "bert")


def test_imagereward_is_that_of_its_layers_by_hand(image_reward_files, images):
    weights, tokenizer = image_reward_files
    reward = ImageReward(RewardFiles(weights, MED_CONFIG, tokenizer), batch_size=2)
    rows = [[2, 4, 5, 3], [2, 6, 3], [2, 29, 28, 27, 26, 3]]
    tokens = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
    plain, pixels = Plain(published_image_reward()), (images - MEANS) / STDS
    expected = plain.reward(pixels, tokens, (tokens > 0).long())
    assert expected.std() > 0.01
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reward.image_features(images), plain.see(pixels)[:, 0], rtol=1e-4, atol=1e-4)
    assert (MEAN, DEVIATION) == (0.16717362830052426, 1.0333394966054072)


def test_imagereward_says_what_it_cuts_and_keeps_a_nan_to_its_image(image_reward_files, images, caplog):
    weights, tokenizer = image_reward_files
    reward = ImageReward(RewardFiles(weights, MED_CONFIG, tokenizer))
    reward.say_what_is_cut([" ".join("a" * 33), " ".join("a" * 34), "b"])
    assert caplog.messages == [
        "reward imagereward reads 33 tokens of a prompt: 1 of 3 prompts are longer and judged by these"
    ]
    caplog.clear()
    reward.say_what_is_cut(["a dog", "a b"])  # the tokenizer of this test has letters alone
    assert [message.split(":")[0] for message in caplog.messages] == [
        "reward imagereward was taught no word of 1 of 2 prompts, for example 'a dog'"
    ]
    images[1, 0, 3, 3] = torch.nan
    assert reward.score(images, PROMPTS).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        reward.score(images, ["x"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("blip.visual_encoder.norm.bias"), "1 missing (post_layernorm.bias)"),
        (lambda state: state.update({"blip.text_encoder.more": torch.zeros(1)}), "1 not belonging to it (more)"),
        (
            lambda state: state.pop("mlp.layers.7.bias"),
            "its head is no stack of linear layers for 24 features: layers.7",
        ),
        (lambda state: state.pop("blip.visual_encoder.cls_token"), "no BLIP that its description fits"),
        (lambda state: state.update({"blip.visual_encoder.norm.bias": torch.zeros(3)}), "1 of another shape"),
    ],
)
def test_another_checkpoint_than_imagereward_is_explained_in_a_line(tmp_path, change, says):
    state = published_image_reward()
    change(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(InputError) as error:
        ImageReward(RewardFiles(tmp_path / "ImageReward.pt", MED_CONFIG, write_bert_tokenizer(tmp_path / "bert")))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", [{"num_hidden_layers": 10**9}, {"hidden_size": 25}, {"vocab_size": "many"}])
def test_another_description_is_refused_in_a_line(image_reward_files, said):
    weights, tokenizer = image_reward_files
    with pytest.raises(InputError) as error:
        ImageReward(RewardFiles(weights, {**MED_CONFIG, **said}, tokenizer))
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(image_reward_files):
    weights, tokenizer = image_reward_files
    state = published_image_reward()
    words = state["blip.text_encoder.embeddings.word_embeddings.weight"]
    state["blip.text_encoder.embeddings.word_embeddings.weight"] = words[:20].clone()
    torch.save(state, weights)
    with pytest.raises(InputError, match=r"does not belong to .*: it has 31 tokens, the model knows 20"):
        ImageReward(RewardFiles(weights, {**MED_CONFIG, "vocab_size": 20}, tokenizer))


# --- MPS

CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 55, "width": 32, "heads": 2, "layers": 1},
}
HEADS = 2


def published_cross_layers(seed: int = 1) -> dict[str, Tensor]:
    """Random tensors of two layers under the published names."""
    width, inner = CLIP["embed_dim"], 4 * CLIP["embed_dim"]
    shapes = {}
    for i in range(2):
        cross, own = (f"layers.{i}.{part}.fn" for part in (0, 1))
        shapes |= {f"{cross}.to_q.weight": (HEADS * 64, width), f"{cross}.to_kv.weight": (128, width)}
        shapes |= {f"{cross}.to_out.weight": (width, HEADS * 64), f"{cross}.ff.0.weight": (2 * inner, width)}
        shapes |= {f"{cross}.ff.2.weight": (width, inner), f"{own}.ff_out.1.weight": (width, inner)}
        shapes |= {f"{own}.fused_attn_ff_proj.weight": (HEADS * 64 + 128 + 2 * inner, width)}
        shapes |= {f"{own}.attn_out.weight": (width, HEADS * 64)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    for i in range(2):
        for part in (0, 1):
            state[f"layers.{i}.{part}.fn.norm.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
            state[f"layers.{i}.{part}.fn.norm.bias"] = torch.zeros(width)
        state[f"layers.{i}.1.fn.rotary_emb.inv_freq"] = 1 / 10_000 ** (torch.arange(0, 64, 2) / 64)
    return state


def mps_state() -> dict[str, Tensor]:
    model = clip.from_open_clip(random_plain_clip(CLIP).state_dict(), CLIP, source="test")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["model.text_model.embeddings.position_ids"] = torch.arange(10)[None]
    return {**state, **{f"cross_model.{name}": tensor for name, tensor in published_cross_layers().items()}}


def tokens_of(text: str) -> list[int]:
    """By hand, see `write_letter_tokenizer`: every word of one letter; filled up with the mark of the end."""
    words = text.replace(",", " ").replace(".", " ").split()
    row = [53, *(26 + LETTERS.index(word) for word in words)][:9]
    return [*row, *[54] * (10 - len(row))]


def cross_by_hand(image: Tensor, text: Tensor, allowed: Tensor) -> Tensor:
    """The layers of MPS on an image's tokens [N, I, D]; text [N, J, D], allowed bool [N, J]."""
    state = published_cross_layers()
    x = image
    for i in range(2):
        cross, own = (
            lambda y, part, name=f"layers.{i}.{which}.fn": y @ state[f"{name}.{part}.weight"].T for which in (0, 1)
        )
        norm = [functional.layer_norm(x, x.shape[-1:], state[f"layers.{i}.0.fn.norm.weight"])]
        keys, values = cross(text, "to_kv").split(64, dim=-1)
        attended = attention(
            cross(norm[0], "to_q"), keys.repeat(1, 1, HEADS), values.repeat(1, 1, HEADS), HEADS, allowed
        )
        value, gate = cross(norm[0], "ff.0").chunk(2, dim=-1)
        x = x + cross(attended, "to_out") + cross(value * gate * gate.sigmoid(), "ff.2")
        y = functional.layer_norm(x, x.shape[-1:], state[f"layers.{i}.1.fn.norm.weight"])
        q, k, v, ff = own(y, "fused_attn_ff_proj").split((HEADS * 64, 64, 64, 8 * CLIP["embed_dim"]), dim=-1)
        angles = torch.outer(torch.arange(float(x.shape[1])), state[f"layers.{i}.1.fn.rotary_emb.inv_freq"]).repeat(
            1, 2
        )

        def turned(part: Tensor, angles: Tensor = angles) -> Tensor:
            first, second = part.chunk(2, dim=-1)
            return part * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

        q = torch.cat([turned(head) for head in q.split(64, dim=-1)], dim=-1)
        attended = attention(q, turned(k).repeat(1, 1, HEADS), v.repeat(1, 1, HEADS), HEADS)
        value, gate = ff.chunk(2, dim=-1)
        x = x + own(attended, "attn_out") + own(value * gate * gate.sigmoid(), "ff_out.1")
    return x[:, 0]


def expected_mps(images: Tensor, condition: str, relevant: float = 0.01) -> Tensor:
    """One image and prompt after the other, as the published code scores them."""
    plain, scores = random_plain_clip(CLIP), []

    def words(text: str) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([tokens_of(text)])
        x = plain.transformer(plain.token_embedding(tokens) + plain.positional_embedding, plain.mask)
        every = plain.ln_final(x) @ plain.text_projection
        return every, every[:, tokens[0].tolist().index(54)]

    vision = plain.visual
    for image, prompt in zip(images, PROMPTS, strict=True):
        patches = vision.conv1(((image - MEANS) / STDS)[None]).flatten(2).mT
        x = torch.cat([vision.class_embedding.expand(1, 1, -1), patches], dim=1) + vision.positional_embedding
        tokens = vision.transformer(vision.ln_pre(x)) @ vision.proj  # no last norm: that is the first token's alone
        text, pooled = words(prompt)
        similar = torch.einsum("bid,bjd->bji", text, words(condition)[0]).amax(1)
        seen = cross_by_hand(tokens, text, similar / similar.max() > relevant)
        scores.append(plain.logit_scale.exp() * torch.cosine_similarity(seen, pooled))
    return torch.cat(scores)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    write_letter_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def condition(monkeypatch) -> str:
    """One that the tokenizer of letters can read."""
    monkeypatch.setattr("training.ppo.rewards.mps.CONDITION", "q r")
    return "q r"


@pytest.mark.parametrize("relevant", [0.01, 0.7])
def test_mps_is_that_of_its_layers_by_hand(tmp_path, images, letters, condition, monkeypatch, relevant):
    """Random tokens are alike: at the published 0.01 all of them are looked at, at 0.7 some."""
    assert (RELEVANT, CONDITION[:20]) == (0.01, "light, color, clarit")
    monkeypatch.setattr("training.ppo.rewards.mps.RELEVANT", relevant)
    torch.save(mps_state(), tmp_path / "MPS.pth")
    reward = MPS(RewardFiles(tmp_path / "MPS.pth", {"model_cfg": CLIP}, letters), batch_size=2)
    masks = torch.stack([reward._read(prompt)["mask"] for prompt in PROMPTS])
    assert masks.any(dim=1).all()
    assert masks.all() == (relevant == 0.01)
    expected = expected_mps(images, condition, relevant)
    assert expected.std() > 0.05
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)  # texts are kept
    features = random_plain_clip(CLIP).encode_image((images - MEANS) / STDS)
    torch.testing.assert_close(reward.image_features(images), features, rtol=1e-4, atol=1e-4)


class Ran(Exception):
    pass


def pickled_whole(path: Path) -> None:
    """As published: a module of classes that are not here, pickled with `torch.save`, with a config object in it."""
    home = types.ModuleType("trainer_of_tests")

    class Part(nn.Module):
        pass

    class Config:
        def __init__(self) -> None:
            self.dtype, self.sizes = torch.float16, {"width": 3}

    for kind in (Part, Config):
        kind.__module__, kind.__qualname__ = home.__name__, kind.__name__
        setattr(home, kind.__name__, kind)
    whole = Part()
    for name, tensor in mps_state().items():
        *parts, leaf = name.split(".")
        place = whole
        for part in parts:
            if part not in place._modules:
                place.add_module(part, Part())
            place = place._modules[part]
        if (leaf in ("bias", "inv_freq", "position_ids") and "cross_model" in name) or leaf == "position_ids":
            place.register_buffer(leaf, tensor, persistent=leaf != "position_ids")
        else:
            place.register_parameter(leaf, nn.Parameter(tensor))
    whole.config, whole.activation, whole.nothing = Config(), nn.GELU(), None
    whole.register_module("absent", None)
    sys.modules[home.__name__] = home
    try:
        torch.save(whole, path)
    finally:
        del sys.modules[home.__name__]


def test_a_module_that_was_pickled_whole_is_read_without_its_classes(tmp_path, images, letters, condition):
    pickled_whole(tmp_path / "MPS.pth")
    found, expected = read_module(tmp_path / "MPS.pth"), mps_state()
    expected.pop("model.text_model.embeddings.position_ids")  # not persistent
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    reward = MPS(RewardFiles(tmp_path / "MPS.pth", {"model_cfg": CLIP}, letters))
    torch.testing.assert_close(reward.score(images, PROMPTS), expected_mps(images, condition), rtol=1e-4, atol=1e-4)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_nothing_of_a_pickled_module_is_run(tmp_path):
    module = nn.Linear(2, 2)
    module.bomb = Bomb()
    torch.save(module, tmp_path / "bomb.pth")
    assert read_module(tmp_path / "bomb.pth").keys() == {"weight", "bias"}


def test_numbers_that_are_not_there_are_counted_not_shown(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "cut.pth", "w") as cut:
        for entry in whole.infolist():
            content = whole.read(entry)
            cut.writestr(entry.filename, content + bytes(10_000) if entry.filename.endswith("data/0") else content)
    with pytest.raises(InputError, match=r"4 numbers are to lie in data/0, which has 10016 bytes$"):
        read_module(tmp_path / "cut.pth")


def looped() -> nn.Module:
    module = nn.Linear(2, 2)
    module._modules["again"] = module
    return module


def no_tables() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].__dict__["_buffers"] = 3
    return module


@pytest.mark.parametrize("module", [looped, no_tables, lambda: pickle.PickleError()])
def test_what_is_no_module_of_torch_is_refused_in_a_line(tmp_path, module):
    torch.save(module(), tmp_path / "odd.pth")
    with pytest.raises(InputError) as error:
        read_module(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_another_checkpoint_than_mps_is_explained(tmp_path, letters):
    state = mps_state()
    for name, says in (
        ("cross_model.layers.1.1.fn.attn_out.weight", "1 missing"),
        ("cross_model", "no checkpoint of MPS"),
    ):
        torch.save({key: value for key, value in state.items() if not key.startswith(name)}, tmp_path / "MPS.pth")
        with pytest.raises(InputError, match=says):
            MPS(RewardFiles(tmp_path / "MPS.pth", {"model_cfg": CLIP}, letters))
    torch.save({key: value for key, value in state.items() if "logit" not in key}, tmp_path / "MPS.pth")
    with pytest.raises(InputError, match="1 missing: logit_scale"):
        MPS(RewardFiles(tmp_path / "MPS.pth", {"model_cfg": CLIP}, letters))
