"""Fetching and checking assets, against a hub on loopback: good, cut off, corrupt, cached, refused, missing."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from safetensors.torch import load_file, save_file

import download_hpsv2_weights
from errors import InputError
from models import asset_table, assets
from models.asset_table import BUNDLES, AssetFile, Bundle, HubFile, published_name
from models.digests import record_of
from models.pipelines import load_folder
from models.registry import REGISTERED, SOURCE
from tests.hub import Hub, running_hub
from tests.tiny_families import save_flat_ddpm
from tests.tiny_pipeline import modules_of, save_tiny_pipeline
from training.networks import near_euler_table
from training.snapshot import load_snapshot, save_snapshot

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()
PATH = "/someone/thing/resolve/main/thing.bin"
HUB_FILE = HubFile("someone/thing", "thing.bin")
PINNED = AssetFile("weights/thing.bin", HUB_FILE, len(BODY), f"sha256:{SHA256}")
UNKNOWN = AssetFile("weights/thing.bin", HUB_FILE)


def point_to(address: str, monkeypatch) -> None:
    """What HF_ENDPOINT does, as far as it was read when huggingface_hub was imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as server:
        point_to(server.address, monkeypatch)
        server.files[PATH] = BODY
        yield server


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "weights" / "thing.bin"


def fetch(asset: AssetFile, target: Path) -> str:
    notes: list[str] = []
    assets.fetch(asset, target, notes.append)
    return "\n".join(notes)


def refusal(asset: AssetFile, target: Path) -> str:
    with pytest.raises(InputError) as error:
        fetch(asset, target)
    return str(error.value)


def names_beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


# --- good


def test_a_file_arrives_whole_and_alone(hub, target):
    assert SHA256 in fetch(PINNED, target)
    assert target.read_bytes() == BODY
    assert names_beside(target) == ["thing.bin"]


def test_a_file_that_is_there_is_verified_and_not_fetched_again(hub, target):
    fetch(PINNED, target)
    hub.requests.clear()
    assert "is there, its SHA256 is the published one" in fetch(PINNED, target)
    assert hub.requests == []


def test_what_nothing_is_published_of_is_recorded_and_held_to_it_afterwards(hub, target):
    assert "no published digest is known, recorded in thing.bin.sha256" in fetch(UNKNOWN, target)
    assert record_of(target).read_text() == f"{SHA256}  thing.bin\n"
    assert "the one of its first fetch" in fetch(UNKNOWN, target)
    target.write_bytes(BODY[:-1] + b"!")
    assert f"instead of {SHA256}" in refusal(UNKNOWN, target)


def test_a_plain_url_is_fetched_as_well(hub, target):
    asset = AssetFile("weights/thing.bin", hub.address + PATH)
    assert "recorded" in fetch(asset, target)
    assert target.read_bytes() == BODY


def test_the_token_goes_to_the_hub_and_not_to_the_storage_it_points_to(hub, target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.token, hub.storage = "hf_mine", True
    fetch(PINNED, target)
    assert target.read_bytes() == BODY
    assert [(method, authorization) for method, _, _, authorization in hub.requests] == [
        ("HEAD", "Bearer hf_mine"),
        ("GET", None),
    ]


# --- cut off


def test_a_broken_download_is_kept_and_gone_on_with(hub, target, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what comes of a last, incomplete chunk is lost
    hub.cut_after = 1000
    message = refusal(PINNED, target)
    assert "503" in message
    assert "1000 bytes are kept: run the same command again" in message
    assert not target.exists()
    hub.broken = False
    fetch(PINNED, target)
    assert target.read_bytes() == BODY
    assert hub.ranges() == [None, "bytes=1000-", "bytes=1000-"]
    assert names_beside(target) == ["thing.bin"]


def test_what_is_kept_of_another_version_is_not_gone_on_with(hub, target, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut_after = 1000
    refusal(UNKNOWN, target)
    hub.broken, hub.files[PATH] = False, BODY[::-1]
    fetch(UNKNOWN, target)
    assert target.read_bytes() == BODY[::-1]


# --- corrupt


@pytest.mark.parametrize("asset", [PINNED, UNKNOWN])
def test_a_corrupt_download_is_deleted(hub, target, asset):
    hub.files[PATH] = BODY[:-1] + b"!"
    hub.etags[PATH] = SHA256
    message = refusal(asset, target)
    assert "is not it" in message
    assert "Nothing was kept" in message
    assert names_beside(target) == []


def test_a_page_in_the_place_of_what_nothing_is_published_of_is_not_kept(hub, target):
    hub.files[PATH] = b"\n<!DOCTYPE html><html>too many people have fetched it</html>"
    message = refusal(AssetFile("weights/thing.bin", hub.address + PATH), target)
    assert "it is an HTML or XML page" in message
    assert names_beside(target) == []


def test_another_size_than_the_published_one_is_not_even_fetched(hub, target):
    hub.files[PATH] = b"<html>please log in</html>"
    assert f"26 bytes, {len(BODY)} are published" in refusal(PINNED, target)
    assert hub.ranges() == []


def test_a_wrong_file_in_the_place_is_neither_used_nor_deleted(hub, target):
    target.parent.mkdir()
    target.write_text("<html>please log in</html>")
    message = refusal(PINNED, target)
    assert f"26 bytes instead of {len(BODY)}: it is an HTML or XML page" in message
    assert "Move it away" in message
    assert target.exists()
    assert hub.requests == []


def test_one_published_file_in_the_place_of_another_is_named(target, monkeypatch):
    other = AssetFile("weights/other.bin", HUB_FILE, digest=f"md5:{hashlib.md5(BODY[:-1]).hexdigest()}")
    monkeypatch.setitem(asset_table.BUNDLES, "other", Bundle("", "", (other,)))
    target.parent.mkdir()
    target.write_bytes(BODY[:-1])
    assert f"{len(BODY) - 1} bytes instead of {len(BODY)}: it is other.bin. Move it away" in refusal(PINNED, target)


# --- refused, missing, unreachable


@pytest.mark.parametrize(
    ("status", "says"), [(401, "set HF_TOKEN"), (403, "accept its terms"), (404, "not there"), (500, "answered 500")]
)
def test_a_refusal_says_what_to_do(hub, target, status, says):
    hub.refused[PATH] = status
    assert says in refusal(PINNED, target)
    assert not target.exists()


def test_a_hub_that_cannot_be_reached(target, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_to("http://127.0.0.1:9", monkeypatch)
    assert "thing.bin was not fetched from someone/thing" in refusal(PINNED, target)


def test_too_small_a_disk_is_said_before_anything_is_fetched(hub, target, monkeypatch):
    monkeypatch.setattr(assets, "SPARE_SPACE", 10**18)
    assert "0.0 GB are needed" in refusal(PINNED, target)
    assert hub.ranges() == []


# --- the commands


@pytest.fixture
def things(monkeypatch, tmp_path, hub) -> Path:
    """One bundle of one file, in a repository of its own."""
    monkeypatch.setattr(asset_table, "ROOT", tmp_path)
    bundle = Bundle("a thing", "MIT", (PINNED,), AssetFile("weights/other.bin", HUB_FILE, 3))
    monkeypatch.setattr(assets, "BUNDLES", {"thing": bundle})
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(assets.main, arguments)


def test_fetch_and_doctor(things):
    missing = invoke("doctor", "thing")
    assert missing.exit_code == 1
    assert f"missing weights/thing.bin  {len(BODY):,} bytes" in missing.output
    assert "Licence: MIT" in missing.output
    briefly = invoke("doctor")
    assert briefly.exit_code == 0
    assert re.search("^thing +missing  ", briefly.output, re.MULTILINE)
    assert "weights/thing.bin" not in briefly.output
    assert "doctor NAME" in briefly.output
    fetched = invoke("fetch", "thing")
    assert fetched.exit_code == 0, fetched.output
    found = invoke("doctor", "thing")
    assert found.exit_code == 0
    assert f"ok      weights/thing.bin  {len(BODY):,} bytes, its SHA256 is the published one" in found.output
    assert "torch " in found.output
    (things / "weights" / "thing.bin").write_bytes(BODY[:-1])
    wrong = invoke("doctor")
    assert wrong.exit_code == 1
    assert f"WRONG   weights/thing.bin  it has {len(BODY) - 1} bytes instead of {len(BODY)}" in wrong.output


def test_what_serves_as_well_is_not_fetched_again(things, hub):
    (things / "weights").mkdir()
    (things / "weights" / "other.bin").write_bytes(b"abc")
    assert invoke("fetch", "thing").exit_code == 0
    assert hub.requests == []
    assert "ok      weights/other.bin" in invoke("doctor", "thing").output


@pytest.mark.parametrize("command", ["fetch", "doctor"])
def test_unknown_names_are_answered_with_the_known_ones(things, command):
    result = invoke(command, "thinng")
    assert result.exit_code == 2
    assert "Unknown asset thinng. Known: thing" in result.output


def test_a_hubs_pipeline_that_is_not_there(things):
    result = invoke("fetch", "nobody/nothing")
    assert result.exit_code == 2
    assert "nobody/nothing was not fetched" in result.output


@pytest.fixture
def pipeline_hub(tmp_path, monkeypatch) -> Path:
    """A hub's pipeline in a folder, handed out file by file as the hub's library does."""
    offered, cache = save_tiny_pipeline(tmp_path / "hub"), tmp_path / "cache"

    def download(_: str, allow_patterns: list[str]) -> str:
        for file in offered.rglob("*"):
            name = file.relative_to(offered).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(assets, "snapshot_download", download)
    return offered


def renamed(folder: Path, part: str, name: str) -> Path:
    """The component's weights under another name; a .bin is what torch writes."""
    (file,) = (folder / part).glob("*.safetensors")
    if name.endswith(".bin"):
        torch.save(load_file(file), folder / part / name)
        file.unlink()
        return folder / part / name
    return file.rename(folder / part / name)


OLDER = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.bin") | {"text_encoder": "pytorch_model.bin"}
HALF = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.fp16.safetensors")
HALF |= {"text_encoder": "model.fp16.safetensors"}


@pytest.mark.parametrize("other", [{}, {"vae": OLDER["vae"]}, OLDER, HALF, {**OLDER, "unet": HALF["unet"]}])
def test_a_hubs_pipeline_is_fetched_with_weights_that_load(pipeline_hub, other):
    _, whole = load_folder(pipeline_hub)
    for part, name in other.items():
        renamed(pipeline_hub, part, name)
    said = []
    folder = assets.fetch_pipeline("someone/model", said.append)
    assert said == [f"someone/model: fetched to {folder}"]
    _, fetched = load_folder(folder)
    for found, expected in zip(modules_of(fetched), modules_of(whole), strict=True):
        weights = expected.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_hubs_flat_ddpm_is_fetched(pipeline_hub, name):
    shutil.rmtree(pipeline_hub)
    save_flat_ddpm(pipeline_hub)
    renamed(pipeline_hub, ".", name)
    (pipeline_hub / "images").mkdir()
    (pipeline_hub / "images" / "one.png").touch()
    folder = assets.fetch_pipeline("someone/model", lambda line: None)
    wanted = {"model_index.json", "config.json", "scheduler_config.json", name}
    assert {file.relative_to(folder).as_posix() for file in folder.rglob("*")} == wanted
    load_folder(folder)


def test_older_weights_are_read_without_a_word(pipeline_hub, caplog):
    for part, name in OLDER.items():
        renamed(pipeline_hub, part, name)
    diffusers.utils.logging.enable_propagation()
    try:
        load_folder(pipeline_hub)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not caplog.messages


def test_of_two_variants_the_wide_one_is_fetched_and_read(pipeline_hub):
    _, whole = load_folder(pipeline_hub)
    (file,) = (pipeline_hub / "unet").glob("*.safetensors")
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file.parent / HALF["unet"])
    folder = assets.fetch_pipeline("someone/model", lambda line: None)
    assert not list(folder.rglob("*fp16*"))
    _, both = load_folder(pipeline_hub)
    assert torch.equal(both.pipeline.network.conv_in.weight, whole.pipeline.network.conv_in.weight)


def test_a_hubs_pipeline_without_weights_that_can_be_used_says_what_is_missing(pipeline_hub):
    renamed(pipeline_hub, "unet", "diffusion_pytorch_model.ema.safetensors")
    (pipeline_hub / "vae" / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        assets.fetch_pipeline("someone/model", lambda line: pytest.fail(line))
    for said in ("someone/model", "unet/diffusion_pytorch_model.safetensors or", "vae/config.json"):
        assert said in str(caught.value)


def test_a_hubs_pipeline_whose_older_weights_are_damaged_is_no_use(pipeline_hub):
    file = renamed(pipeline_hub, "vae", OLDER["vae"])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"someone/model.*diffusion_pytorch_model\.bin.*CRC-32"):
        assets.fetch_pipeline("someone/model", lambda line: pytest.fail(line))


def test_the_weights_of_hps_and_their_tokenizer(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(asset_table, "ROOT", tmp_path)
    monkeypatch.setattr(download_hpsv2_weights, "HPS", {"v2.1": PINNED, "v2.0": UNKNOWN})
    monkeypatch.setattr(download_hpsv2_weights, "TOKENIZER", (AssetFile("src/vocab.json", HUB_FILE),))
    arguments = ["--version", "v2.1", "--output-dir", str(tmp_path / "mine")]
    result = CliRunner().invoke(download_hpsv2_weights.main, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine" / "thing.bin").read_bytes() == (tmp_path / "src" / "vocab.json").read_bytes() == BODY


FETCH_FOR_REAL = """
import sys
from pathlib import Path
from models import asset_table, assets
from models.asset_table import AssetFile, Bundle, HubFile
asset_table.ROOT = Path(sys.argv[1])
assets.BUNDLES["coco-prompts"] = Bundle("", "", (AssetFile("thing.bin", HubFile("someone/thing", "thing.bin")),))
assets.main(["fetch", "coco-prompts"])
"""


def test_the_variables_of_the_hub_are_honoured(hub, tmp_path):
    """In a process of its own, as huggingface_hub reads some of them when it is imported."""
    hub.token = "hf_mine"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FETCH_FOR_REAL, str(tmp_path)]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=SOURCE.parent)

    offline = run()
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert "Traceback" not in offline.stderr
    assert hub.requests == []
    environment["HF_HUB_OFFLINE"] = "0"
    online = run()
    assert online.returncode == 0, online.stderr
    assert (tmp_path / "thing.bin").read_bytes() == BODY


def test_the_published_tables_are_fetched_verified_and_read(hub, tmp_path, monkeypatch):
    """Of a pickle as the public code base writes it, from a server in the place of theirs."""
    monkeypatch.setattr(asset_table, "ROOT", tmp_path)
    pickled = save_snapshot(tmp_path / "made" / "table", near_euler_table(2, 2), {"backend": "sd3"}).read_bytes()
    tables = [replace(table, source=f"{hub.address}/resolve/{table.path}") for table in asset_table.EPD_TABLES[3:5]]
    fitting = replace(tables[0], size=len(pickled), digest=f"sha256:{hashlib.sha256(pickled).hexdigest()}")
    hub.files |= {f"/resolve/{table.path}": pickled for table in tables}
    foreign = replace(tables[1], size=len(pickled))
    monkeypatch.setitem(BUNDLES, "epd-tables", Bundle("", "", (fitting, foreign)))
    result = invoke("fetch", "epd-tables")
    assert result.exit_code == 2  # the second has other sums
    assert "What came as sd3-512-distilled.pkl" in result.output
    assert "Nothing was kept" in result.output
    table, metadata = load_snapshot(tmp_path / "exps" / "sd3-512" / "sd3-512-start.pkl")
    assert (table.num_points, metadata["backend"]) == (2, "sd3")
    assert not (tmp_path / "exps" / "sd3-512" / "sd3-512-distilled.pkl").exists()


def test_a_models_short_name_is_its_pipeline_on_the_hub_and_a_gated_one_says_how_to_log_in(hub, monkeypatch):
    asked: list[str] = []

    def gated(hub_id: str, **_: object) -> None:
        asked.append(hub_id)
        hub.refused[f"/{hub_id}/resolve/main/model_index.json"] = 403
        get_hf_file_metadata(hf_hub_url(hub_id, "model_index.json"))

    monkeypatch.setattr(assets, "snapshot_download", gated)
    for name, hub_id in asset_table.PIPELINES.items():
        result = invoke("fetch", name)
        assert result.exit_code == 2
        assert f"those who accept its terms at {hub.address}/{hub_id}; then hf auth login" in result.output
        assert result.output.count("\n") == 1
    assert asked == list(asset_table.PIPELINES.values())
    assert set(asked) < {model.pipeline for model in REGISTERED.values()}


# --- the table


def test_every_file_of_the_table_lies_where_git_ignores_it_and_has_one_entry():
    files = [asset for bundle in BUNDLES.values() for asset in bundle.files]
    assert len({asset.path for asset in files}) == len(set(files))
    paths = sorted({asset.path for asset in files} | {f"{asset.path}.sha256" for asset in files})
    ignored = subprocess.run(
        ["git", "check-ignore", *paths], cwd=SOURCE.parent, capture_output=True, text=True, check=False
    )
    if ignored.returncode == 128:
        pytest.skip("this is no git checkout")
    assert ignored.stdout.splitlines() == paths


def test_digests_are_well_formed():
    lengths = {"sha256": 64, "md5": 32}
    for bundle in BUNDLES.values():
        for asset in bundle.files:
            if asset.digest is not None:
                algorithm, _, digits = asset.digest.partition(":")
                assert len(bytes.fromhex(digits)) * 2 == lengths[algorithm]


def test_what_the_registry_looks_for_is_what_is_fetched():
    files = {asset.path for asset in BUNDLES["sd15"].files}
    model = REGISTERED["sd15"]
    assert {f"src/{asset.path}" for asset in (model.weights[0], *model.companions)} == files


def test_a_published_file_is_recognised_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(asset_table.BUNDLES, "thing", Bundle("", "", (PINNED,)))
    (tmp_path / "renamed.pt").write_bytes(BODY)
    (tmp_path / "other.pt").write_bytes(BODY[::-1])
    assert published_name(tmp_path / "renamed.pt") == "thing.bin"
    assert published_name(tmp_path / "other.pt") is None
