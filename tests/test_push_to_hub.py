"""A solver goes to a hub and is used from there, by diffusers and by our own commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sample
from errors import InputError
from models import load_denoiser
from scripts import push_to_hub
from tests.hub import Hub
from tests.test_assets import hub  # noqa: F401  a fixture
from tests.test_diffusers_export import DISCRETE, run_code
from tests.test_diffusers_scheduler import CPU, with_columns
from tests.tiny_pipeline import save_tiny_pipeline
from training.diffusers_export import SOLVER_FILE, write_diffusers
from training.snapshot import save_snapshot
from training.solver import load_solver

REPOSITORY = "someone/solver"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_folder(tmp_path: Path, model: Path) -> Path:
    """A run with an export, whose model has a name on a hub."""
    metadata = {**DISCRETE, "model_path": str(model)}
    solver = load_solver(save_snapshot(tmp_path / "run" / "export" / "network-snapshot-1", with_columns(2), metadata))
    denoiser = load_denoiser(model, device=CPU, dtype=torch.float32)
    write_diffusers(tmp_path / "run" / "export" / "diffusers", solver, denoiser, "owner/model")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def invoke(command: Any, *arguments: str | Path) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def pushed(folder: Path) -> Any:
    return invoke(push_to_hub.main, folder, "--repo", REPOSITORY)


def test_what_is_pushed_is_the_folder_with_the_repositorys_name_in_its_card(
    run_folder: Path,
    hub: Hub,  # noqa: F811
) -> None:
    folder = run_folder / "export" / "diffusers"
    hidden = folder / ".solver.json.0a1b2c3d.tmp"  # what a killed export leaves
    hidden.touch()
    result = pushed(run_folder)
    assert result.exit_code == 0, result.output
    assert f"{hub.address}/{REPOSITORY}: 6 files" in result.output
    there = hub.repository(REPOSITORY)
    hidden.unlink()
    assert there.keys() == {path.name for path in folder.iterdir()}
    assert all(there[name] == (folder / name).read_bytes() for name in there.keys() - {"README.md"})
    card = there["README.md"].decode()
    assert f'solver = "{REPOSITORY}"' in card
    assert "OWNER/NAME" not in card
    assert str(run_folder.parent) not in "".join(body.decode() for body in there.values())  # no path of this machine
    assert pushed(folder).exit_code == 0  # the folder itself will do, and once more


@pytest.mark.slow
def test_the_card_on_the_hub_says_what_runs(run_folder: Path, hub: Hub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    pushed(run_folder)
    code = re.search(r"```python\n(.*?)```", hub.repository(REPOSITORY)["README.md"].decode(), re.DOTALL)[1]
    (tmp_path / "empty").mkdir()
    # The model is this machine's: the hub of the tests has none.
    run_code(code.replace("owner/model", str(model)), tmp_path / "empty", HF_ENDPOINT=hub.address)
    assert (tmp_path / "empty" / "image.png").stat().st_size > 0


def test_a_solver_is_replayed_from_the_hub_by_its_name(
    run_folder: Path,
    hub: Hub,  # noqa: F811
    model: Path,
    tmp_path: Path,
) -> None:
    pushed(run_folder)
    ours, theirs = load_solver(run_folder), load_solver(REPOSITORY)
    assert theirs.label == "epd-solver"
    assert theirs.model == "owner/model"
    for name, entries in ours.table.columns().items():
        torch.testing.assert_close(theirs.table.columns()[name], entries, rtol=0, atol=0)
    for source, folder in ((REPOSITORY, "from the hub"), (run_folder, "from here")):
        options = ["--model_path", model, "--prompt", "a dog", "--seeds", "1", "--outdir", tmp_path / folder]
        result = invoke(sample.main, "--predictor_path", source, *options)
        assert result.exit_code == 0, result.output
    images = [next((tmp_path / folder).rglob("*.png")).read_bytes() for folder in ("from the hub", "from here")]
    pixels = [image[image.index(b"IDAT") :] for image in images]
    assert pixels[0] == pixels[1]
    assert [path for method, path, *_ in hub.requests if method == "GET"] == [
        f"/{REPOSITORY}/resolve/{'c' * 40}/{SOLVER_FILE}"  # and nothing else of the repository
    ]


def test_what_is_no_solver_here_nor_there_is_said_in_a_line(hub: Hub) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"nobody/nothing: no such snapshot or run here, and none on the hub: .*404"):
        load_solver("nobody/nothing")
    hub.keep("someone/model", "model.safetensors", b"weights")
    with pytest.raises(InputError, match=r"holds no network-snapshot"):
        load_solver("someone/model")
    hub.requests.clear()
    with pytest.raises(InputError, match="exps/nothing: no such snapshot or run; give a file"):
        load_solver("exps/nothing")  # exps is a folder here: nobody is asked
    assert not hub.requests


def refused(folder: Path, repository: str = REPOSITORY) -> str:
    result = invoke(push_to_hub.main, folder, "--repo", repository)
    assert result.exit_code == 2
    return result.output


def test_pushing_is_refused_in_a_line(run_folder: Path, hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    assert "--repo solver: write OWNER/NAME" in refused(run_folder, "solver")
    assert "has no export yet:  python -m training.ppo.export_epd_predictor" in refused(tmp_path)
    assert "elsewhere: no such folder of a run\n" in refused(tmp_path / "elsewhere")
    assert "Of a solver's file:  python -m scripts.export_diffusers 4 --outdir FOLDER" in refused(Path("4"))
    hub.token = "hf_mine"
    assert "nothing was uploaded: 401, access denied: set HF_TOKEN" in refused(run_folder)
    card = run_folder / "export" / "diffusers" / "README.md"
    card.write_text(card.read_text().replace("base_model: owner/model\n", ""))
    assert "export it anew with --base OWNER/NAME" in refused(run_folder)
    (card.parent / SOLVER_FILE).unlink()
    assert f"{SOLVER_FILE} missing; export it anew" in refused(run_folder)
    assert json.dumps(hub.repository(REPOSITORY)) == "{}"
