"""Weights files: every byte is held against a checksum, and what is forged ends in one message."""

from __future__ import annotations

import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from errors import InputError
from models.checkpoints import read_state_dict
from models.digests import record_of, record_weights

WORLDS = ("shapes", "shapes_flow", "shapes_ddpm")
SHIPPED = [path for world in WORLDS for path in Path("src", world).rglob("*.safetensors")]


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = {f"layers.{number}.weight": torch.randn(5, 7, generator=generator) for number in range(3)}
    return {**whole, "half": torch.ones(3).half(), "steps": torch.arange(4), "bfloat": torch.ones(2).bfloat16()}


def written(path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights(), path)
        record_weights(path.parent)
    else:
        torch.save({"state_dict": weights(), "epoch": 3}, path)
    return path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def rewritten(path: Path, change=lambda name, content: content, **options: object) -> Path:
    """The same archive, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_record_that_was_emptied_lets_nothing_pass(tmp_path):
    path = written(tmp_path / "weights.safetensors")
    record_of(path).write_bytes(b"")
    with pytest.raises(InputError, match=r"its SHA-256 is not the one in weights\.safetensors\.sha256"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_bit_never_becomes_another_number(tmp_path, suffix):
    whole = written(tmp_path / f"whole{suffix}")
    assert_equal(read_state_dict(whole), weights())
    damaged = tmp_path / f"damaged{suffix}"
    record = record_of(whole)
    if record.exists():
        record_of(damaged).write_bytes(record.read_bytes())
    content, draw, refused = whole.read_bytes(), random.Random(0), 0
    for _ in range(150):
        place = draw.randrange(len(content))
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            found = read_state_dict(damaged)
        except InputError:
            refused += 1
        else:
            assert_equal(found, weights())
    assert refused > 30


def test_a_file_that_is_not_the_recorded_one_says_what_to_do(tmp_path):
    path = written(tmp_path / "model.safetensors")
    save_file({**weights(), "half": torch.zeros(3).half()}, path)
    with pytest.raises(InputError, match=r"is damaged.*replaced on purpose, remove model\.safetensors\.sha256"):
        read_state_dict(path)
    record_of(path).unlink()
    assert read_state_dict(path)["half"].sum() == 0


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_weights_of_the_repository_are_recorded(path):
    assert record_of(path).is_file(), "the command that trains it writes it; by hand: sha256sum in its folder"
    assert read_state_dict(path)


def test_a_compressed_archive_is_not_read_as_numbers(tmp_path):
    path = rewritten(written(tmp_path / "model.pt"), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        read_state_dict(path)


def test_numbers_are_not_taken_from_beside_their_place(tmp_path):
    def claimed(name: str, content: bytes) -> bytes:
        return content.replace(b"K\x03tq", b"K\x30tq") if name.endswith("data.pkl") else content

    torch.save({"half": torch.ones(3).half(), "other": torch.zeros(99)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="48 numbers are to lie in data/0, which has 6 bytes"):
        read_state_dict(rewritten(tmp_path / "model.pt", claimed))


def holding_itself() -> dict:
    content = {"weight": torch.ones(1)}
    content["state_dict"] = content
    return content


def shared() -> dict:
    inner = [1]
    for _ in range(12):
        inner = [inner] * 10
    return {"weight": torch.ones(1), "notes": inner}


class Call:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (holding_itself(), "holds itself"),
        (shared(), "entries"),
        ({"weight": torch.ones(1), "note": Call(bytearray, 10**9)}, "bytearray"),
        ({"weight": torch.ones(1), "note": Call(torch.FloatStorage, 10**9)}, "no readable torch checkpoint"),
        ({"weight": torch.ones(1).expand(2**40)}, "made of 1"),
        ({"weight": 1.0}, "no named tensors"),
        ({"model": weights(), "ema": weights(), "epoch": 3}, "more such under ema, model"),
        ([torch.ones(1)], "holds a list"),
    ],
)
def test_what_is_forged_or_of_another_kind_ends_in_one_message(tmp_path, content, says):
    torch.save(content, tmp_path / "model.pt")
    began = time.process_time()
    with pytest.raises(InputError, match=says) as caught:
        read_state_dict(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def test_what_torch_itself_trips_over_ends_in_one_message(tmp_path):
    def wrong_metadata(name: str, content: bytes) -> bytes:
        # the last argument of a tensor, which is no dict
        return content.replace(b"tq\x0cRq", b"K\x07tq\x0cRq") if name.endswith("data.pkl") else content

    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="AssertionError: expected dict"):
        read_state_dict(rewritten(tmp_path / "model.pt", wrong_metadata))


@pytest.mark.parametrize("damage", ["of several parts", "twice the same name", "no structure", "encrypted"])
def test_an_odd_archive_ends_in_one_message(tmp_path, damage):
    path = written(tmp_path / "model.pt")
    content = path.read_bytes()
    if damage == "of several parts":
        end = content.rindex(b"PK\x06\x07")  # the locator of the zip64 end, whose last number counts the parts
        path.write_bytes(content[: end + 16] + struct.pack("<I", 7) + content[end + 20 :])
    elif damage == "twice the same name":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("model/version", b"3")
    elif damage == "no structure":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/version", b"3")
    else:
        entry = content.index(b"PK\x01\x02")
        path.write_bytes(content[: entry + 8] + b"\x01" + content[entry + 9 :])
    with pytest.raises(InputError, match=r"model\.pt is no readable torch checkpoint") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_wrappers_put_before_all_names_is_dropped(tmp_path, prefix, suffix):
    path, wrapped = tmp_path / f"model{suffix}", {prefix + name: tensor for name, tensor in weights().items()}
    save_file(wrapped, path) if suffix == ".safetensors" else torch.save(wrapped, path)
    assert_equal(read_state_dict(path), weights())


def test_the_weights_of_an_average_are_those_of_its_module(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save(AveragedModel(model).state_dict(), tmp_path / "model.pt")
    assert_equal(read_state_dict(tmp_path / "model.pt"), model.state_dict())


def test_a_prefix_of_some_names_alone_belongs_to_them(tmp_path):
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    torch.save(state, tmp_path / "model.pt")
    assert_equal(read_state_dict(tmp_path / "model.pt"), state)
