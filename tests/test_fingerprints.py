"""Fingerprints of files, folders and models: equal for equal contents, wherever they lie."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path

import pytest

from errors import InputError
from models import registry
from models.families import FAMILIES
from models.fingerprints import file_sha256, fingerprint, model_fingerprint
from models.registry import Asset, RegisteredModel
from tests.test_import_boundaries import REPOSITORY, imported_names
from training.measuring.evaluation import JUDGING_CODE, SAMPLING_CODE, FeatureJudge
from training.measuring.real_images import EXTRACTING_CODE
from training.ppo.panels import JUDGES_CODE, RewardJudge
from training.ppo.rewards import load_reward


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
    write(tmp_path, {"first": "1", "second": "2", "companion": "c", f"{registry.COMPVIS_CONFIGS}/config": "c"})
    assets = (Asset("absent", 1), Asset("first", 1), Asset("second", 1))
    model = RegisteredModel(
        weights=assets, companions=(Asset("companion", 1),), remedy="", prompts="", unknown_words=None, pipeline=""
    )
    monkeypatch.setitem(registry.REGISTERED, "toy", model)
    monkeypatch.setattr("models.registry.SOURCE", tmp_path)
    before = model_fingerprint("toy")
    (tmp_path / "second").write_text("not loaded")
    assert model_fingerprint("toy") == before
    (tmp_path / "companion").write_text("changed")
    assert model_fingerprint("toy") != before


def test_a_single_file_is_what_it_holds_and_the_configurations_that_it_is_read_with(tmp_path, monkeypatch):
    monkeypatch.setattr("models.registry.SOURCE", tmp_path)
    config = write(tmp_path, {"model.safetensors": "w"}) / registry.COMPVIS_CONFIGS / "scheduler/scheduler_config.json"
    found = set()
    for schedule in ("scaled_linear", "linear"):
        write(config.parent, {config.name: schedule})
        found.add(model_fingerprint(tmp_path / "model.safetensors"))
    assert len(found) == 2


# Used on the way to an answer, and without a say in it: what is refused, and where tensors lie.
OF_NO_ACCOUNT = {
    "errors.py",
    "files.py",
    "models/asset_table.py",
    "models/recent.py",
    "models/registry.py",
    "models/devices.py",
    "models/digests.py",
    "models/pickles.py",
    "models/prompts.py",
    "models/skeletons.py",
}
# These make the table, the noise levels and the guidance, every number of which is named beside the latents.
OF_NO_ACCOUNT |= {"models/fingerprints.py", "schedules.py", "training/networks.py", "training/snapshot.py"}


@pytest.mark.parametrize("module", FAMILIES.values())
def test_latents_that_are_kept_count_as_made_by_all_code_that_makes_them(module):
    family = import_module(module).FAMILY
    known = {path.relative_to(REPOSITORY).as_posix() for path in (*SAMPLING_CODE, *family.code)}
    imported = {name for path in known for name in _files_imported_by(REPOSITORY / path)}
    assert known >= imported - OF_NO_ACCOUNT


# Of judges: how their weights are read and numbers kept, and what takes distances, which has a name of its own.
OF_NO_ACCOUNT_TO_JUDGES = {
    "models/checkpoints.py",
    "models/denoiser.py",
    "models/generate.py",
    "models/loading.py",
    "models/recent.py",
    "training/measuring/distances.py",
}


@pytest.mark.parametrize("code", [JUDGES_CODE, EXTRACTING_CODE])
def test_what_is_kept_of_a_judge_counts_as_made_by_all_code_that_makes_it(code):
    own = {path.relative_to(REPOSITORY).as_posix() for path in code}
    known = own | {path.relative_to(REPOSITORY).as_posix() for path in JUDGING_CODE}
    imported = {name for path in own for name in _files_imported_by(REPOSITORY / path)}
    assert known >= imported - OF_NO_ACCOUNT - OF_NO_ACCOUNT_TO_JUDGES


def test_other_code_of_an_extractor_makes_another_judge(tmp_path):
    class Extractor:
        name = fingerprint = "colours"
        code = (tmp_path / "colours.py",)

    found = {FeatureJudge(Extractor()).fingerprint for text in "ab" if Extractor.code[0].write_text(text)}
    assert len(found) == 2


def test_two_functions_of_one_file_are_two_judges(tmp_path, monkeypatch):
    write(tmp_path, {"two_rewards.py": "def bright(images, prompts): return images.mean((1, 2, 3))\ndark = bright\n"})
    monkeypatch.chdir(tmp_path)
    sources = ["two_rewards:bright", "two_rewards:dark"]
    judges = [RewardJudge(source, load_reward(source, device="cpu", batch_size=1), first=True) for source in sources]
    assert judges[0].fingerprint != judges[1].fingerprint


def _files_imported_by(file: Path) -> set[str]:
    """Files of the project, relative to it, that a file imports from."""
    names = {name for _, name in imported_names(file, "models")}
    candidates = {part.replace(".", "/") + ".py" for name in names for part in (name, name.rpartition(".")[0])}
    return {candidate for candidate in candidates if (REPOSITORY / candidate).is_file()}


def test_a_registered_model_without_weights_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SOURCE", tmp_path)
    with pytest.raises(InputError, match=r"Model sd15 needs files that are not there:\n"):
        model_fingerprint("sd15")
