"""Fingerprints of files, folders and models: equal for equal contents, wherever they lie."""

from __future__ import annotations

import hashlib

import pytest

from errors import InputError
from models import registry
from models.fingerprints import file_sha256, fingerprint, model_fingerprint
from models.registry import Asset, RegisteredModel


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


FILES = {"unet/weights": "w" * 3_000_000, "unet/config": "c", "index": "i"}


def test_a_file_is_its_sha256(tmp_path):
    write(tmp_path, FILES)
    assert file_sha256(tmp_path / "unet/weights") == hashlib.sha256(b"w" * 3_000_000).hexdigest()
    with pytest.raises(InputError, match="none: cannot be read"):
        file_sha256(tmp_path / "none")


def test_a_folder_is_its_names_and_contents_and_not_its_place(tmp_path):
    first = fingerprint([write(tmp_path / "a", FILES)])
    assert fingerprint([write(tmp_path / "b", FILES)]) == first
    assert fingerprint([write(tmp_path / "c", {**FILES, "index": "j"})]) != first
    assert fingerprint([write(tmp_path / "d", {**FILES, "more": ""})]) != first
    renamed = {("unet/settings" if name == "unet/config" else name): text for name, text in FILES.items()}
    assert fingerprint([write(tmp_path / "e", renamed)]) != first


def test_a_registered_model_is_the_files_that_are_loaded(tmp_path, monkeypatch):
    write(tmp_path, {"first": "1", "second": "2", "companion": "c"})
    assets = (Asset("absent", 1), Asset("first", 1), Asset("second", 1))
    model = RegisteredModel(weights=assets, companions=(Asset("companion", 1),), remedy="", unknown_words=None)
    monkeypatch.setitem(registry.REGISTERED, "toy", model)
    monkeypatch.setattr("models.fingerprints.SOURCE", tmp_path)
    before = model_fingerprint("toy")
    (tmp_path / "second").write_text("not loaded")
    assert model_fingerprint("toy") == before
    (tmp_path / "companion").write_text("changed")
    assert model_fingerprint("toy") != before
    assert model_fingerprint(tmp_path / "first") == fingerprint([tmp_path / "first"])
