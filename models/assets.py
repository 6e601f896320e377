"""Fetching what the repository does not carry, and checking what is there: `python -m models.assets fetch sd15`.

Downloads go through huggingface_hub, which honours HF_ENDPOINT (another hub or a mirror), HF_TOKEN and HF_HUB_OFFLINE.
A file is written under a temporary name, verified, flushed to disk and renamed: it is whole or not there. What a broken
connection leaves is kept, and the same command goes on from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import huggingface_hub
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from errors import InputError, first_line, shows_input_errors
from files import move
from models import asset_table
from models.asset_table import (
    BUNDLES,
    HUB_ID,
    PIPELINES,
    AssetFile,
    HubFile,
    fault_of,
    pinned_digest,
)
from models.checkpoints import looks_like
from models.devices import free_memory, gigabytes
from models.digests import digest_of, record_digest, record_of

PACKAGES = ("torch", "diffusers", "transformers", "lightning", "omegaconf", "safetensors", "huggingface_hub", "numpy")
SHA256 = re.compile(r"[0-9a-f]{64}")
SPARE_SPACE = 2**28  # bytes left free beside a download

Note = Callable[[str], None]


@dataclass(frozen=True)
class Remote:
    """A file as its server describes it.

    version: a name for these very bytes. size and sha256 are None where the server does not say. headers: to be sent
    with the request.
    """

    url: str
    version: str
    size: int | None = None
    sha256: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def fetch(asset: AssetFile, target: Path, note: Note) -> None:
    """Bring one file to `target`, or verify the one that lies there; `note` is told what was done.

    Raises:
        InputError: another file lies there, the server refuses or lacks it, the connection broke (what came is kept),
            what came is not what was promised (it is deleted), or the disk is too full.
    """
    if target.exists():
        pinned = pinned_digest(asset, target)
        if fault := fault_of(asset, target, pinned):
            raise InputError(f"{target} is not {asset.name}: {fault}. Move it away and run the same command again.")
        note(f"{target}: is there, {_verified_by(asset, pinned)}")
        return
    repository = asset.source.repository if isinstance(asset.source, HubFile) else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remote = _locate(asset)
        part = target.with_name(f"{target.name}.{remote.version}.part")
        _check_space(remote, part, target)
        _download(remote, part, target.name)
    except (HTTPError, OSError) as error:  # a refusal, a server that cannot be reached, a disk
        reason = f"{reason_of(error, repository)}{_kept(target)}"
        raise InputError(f"{asset.name} was not fetched from {asset.source}: {reason}") from None
    digest = _verify(asset, remote, part)
    if asset.digest is None:
        record_digest(target, digest)
    move(part, target)
    recorded = f"; no published digest is known, recorded in {record_of(target).name}" if asset.digest is None else ""
    note(f"{target}: fetched, {target.stat().st_size:,} bytes, SHA-256 {digest}{recorded}")


def fetch_files(hub_id: str, patterns: Sequence[str]) -> Path:
    """Fetch a repository's files of these patterns to the hub's cache on this machine; returns the folder there.

    Raises InputError where the server refuses, lacks or does not deliver them, and the cache has none.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HTTPError, OSError, HFValidationError) as error:
        raise InputError(f"{hub_id} was not fetched: {reason_of(error, hub_id)}") from None


def fetch_pipeline(hub_id: str, note: Note) -> Path:
    """Fetch a diffusers pipeline to the hub's cache on this machine; `models.load_denoiser(hub_id)` finds it there.

    Raises:
        InputError: the server refuses, lacks or does not deliver it, or what it has is no pipeline that can be used:
            then the message says what is missing.
    """
    from models.loading import META  # with diffusers, which takes seconds to import
    from models.pipelines import FORMS, INDEX, contents_of, load_folder

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[INDEX]))
        contents = contents_of(folder)
        snapshot_download(hub_id, allow_patterns=contents.files())
        for form in range(1, FORMS):
            if wanted := contents.weights(form):
                snapshot_download(hub_id, allow_patterns=wanted)
        load_folder(folder, device=META)
    except (HTTPError, OSError) as error:
        raise InputError(f"{hub_id} was not fetched: {reason_of(error, hub_id)}") from None
    except InputError as error:
        raise InputError(f"{hub_id} was fetched, as far as it can be read here, and is no use: {error}") from None
    note(f"{hub_id}: fetched to {folder}")
    return folder


def _locate(asset: AssetFile) -> Remote:
    if isinstance(asset.source, str):
        return Remote(asset.source, "download", asset.size)
    source = asset.source
    url = hf_hub_url(source.repository, source.file, revision=source.revision, repo_type=source.repo_type)
    found = get_hf_file_metadata(url)
    if found.etag is None:
        raise OSError(f"{constants.ENDPOINT} does not answer like a Hugging Face hub (no ETag); check HF_ENDPOINT")
    if asset.size is not None and found.size not in (None, asset.size):
        raise OSError(f"the server offers {found.size} bytes, {asset.size} are published: it is another file")
    # A token is for the hub alone, never for the storage that it points to.
    ours = _host(found.location) == _host(url)
    headers = build_hf_headers() if ours else build_hf_headers(token=False)
    sha256 = found.etag if SHA256.fullmatch(found.etag) else None
    return Remote(found.location, re.sub(r"\W", "", found.etag)[:12], found.size, sha256, headers)


def _host(url: str) -> str:
    return url.split("/")[2]


def _check_space(remote: Remote, part: Path, target: Path) -> None:
    if remote.size is None:
        return
    needed = remote.size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(target.parent).free
    if needed + SPARE_SPACE > free:
        raise OSError(f"{gigabytes(needed)} are needed in {target.parent}, {gigabytes(free)} are free there")


def _download(remote: Remote, part: Path, name: str) -> None:
    start = part.stat().st_size if part.exists() else 0
    if remote.size is not None and start > remote.size:
        part.unlink()
        start = 0
    with part.open("ab") as file:
        http_get(
            remote.url,
            file,
            resume_size=start,
            headers=remote.headers,
            expected_size=remote.size,
            displayed_filename=name,
        )
        file.flush()
        os.fsync(file.fileno())


def _verify(asset: AssetFile, remote: Remote, part: Path) -> str:
    """The SHA-256 of a complete download; one that is not what was promised is deleted."""
    digest = digest_of(part)
    fault = fault_of(asset, part, asset.digest)
    if fault is None and remote.sha256 not in (None, digest):
        fault = f"its SHA-256 is {digest}, the server named {remote.sha256}"
    if fault is None and asset.digest is None and (found := looks_like(part)).startswith("it is an HTML"):
        fault = found  # a page that says why there is no file
    if fault is not None:
        part.unlink()
        raise InputError(
            f"What came as {asset.name} from {asset.source} is not it: {fault}. Nothing was kept; run the same "
            "command again, and check HF_ENDPOINT and proxies if it comes to the same."
        )
    return digest


def _kept(target: Path) -> str:
    kept = sum(part.stat().st_size for part in target.parent.glob(f"{target.name}.*.part"))
    return f" {kept} bytes are kept: run the same command again to go on." if kept else ""


def reason_of(error: HTTPError | OSError | HFValidationError, repository: str | None) -> str:
    """What went wrong between here and a hub, and what to do about it; `repository` is that of the hub, if any."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set. Unset it, or put the file there by hand."
    if isinstance(error, GatedRepoError) or status == 403:
        page = f"at {constants.ENDPOINT}/{repository}" if repository else "on its page"
        return f"access is granted only to those who accept its terms {page}; then hf auth login, or set HF_TOKEN."
    if status == 401:
        return "401, access denied: set HF_TOKEN to a valid token; a hub also says so of what it does not have."
    if status == 404 or (isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)):
        return "404, it is not there (any more): check HF_ENDPOINT."
    if status is not None:
        return f"the server answered {status}; try again later."
    return f"{first_line(error).rstrip('.')}."


def _verified_by(asset: AssetFile, pinned: str | None) -> str:
    if pinned is None:
        return "nothing known to verify it by: neither published nor fetched by this command"
    origin = "the published one" if asset.digest else "the one of its first fetch"
    return f"its {pinned.partition(':')[0].upper()} is {origin}"


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def examine(asset: AssetFile, path: Path) -> tuple[str, str]:
    """The state of a file, `ok`, `missing` or `WRONG`, and what there is to say of it. Reads all of it."""
    if not path.is_file():
        return "missing", "" if asset.size is None else f"{asset.size:,} bytes"
    pinned = pinned_digest(asset, path)
    if fault := fault_of(asset, path, pinned):
        return "WRONG", fault
    return "ok", f"{path.stat().st_size:,} bytes, {_verified_by(asset, pinned)}, SHA-256 {digest_of(path)}"


def machine() -> Iterator[str]:
    """What this machine has to offer, one fact a line."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield f"{package} {importlib.metadata.version(package)}"
    free = free_memory(torch.device("cpu"))
    yield f"memory: {gigabytes(free)} available" if free is not None else "memory: not known on this system"
    yield f"disk: {gigabytes(shutil.disk_usage(asset_table.ROOT).free)} free in {asset_table.ROOT}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}: {torch.cuda.get_device_name(index)}, {gigabytes(free)} of {gigabytes(total)} free"
    if not torch.cuda.is_available():
        yield "cuda: none"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@click.group()
def main() -> None:
    """Fetch and check the files that the repository does not carry."""


@main.command("fetch", epilog="Example:  python -m models.assets fetch sd15 hpsv2 coco-prompts")
@click.argument("names", nargs=-1, required=True, metavar=f"{'|'.join([*BUNDLES, *PIPELINES])}|OWNER/NAME...")
@shows_input_errors
def fetch_command(names: tuple[str, ...]) -> None:
    """Fetch all files of the named assets; whole ones are not fetched twice, broken downloads go on.

    OWNER/NAME is a diffusers pipeline on a hub; sdxl, sd3 and flux are such by their short names. Before sd3 and flux
    are fetched, accept the terms on their pages and log in with `hf auth login`.
    """
    _check_names(names, pipelines=True)
    for name in names:
        if name in BUNDLES:
            fetch_bundle(name, click.echo)
        else:
            fetch_pipeline(PIPELINES.get(name, name), click.echo)


def fetch_bundle(name: str, note: Note) -> None:
    """Fetch every file of a bundle to its place. Raises InputError as `fetch` does."""
    bundle = BUNDLES[name]
    note(f"{name}: {bundle.about}. Licence: {bundle.licence}.")
    for asset in bundle.needed():
        fetch(asset, asset_table.ROOT / asset.path, note)


@main.command("doctor", epilog="Example:  python -m models.assets doctor sd15 hpsv2")
@click.argument("names", nargs=-1, metavar=f"[{'|'.join(BUNDLES)}]...")
@shows_input_errors
def doctor_command(names: tuple[str, ...]) -> None:
    """Check files, packages and memory. Ends with 1 where a file is wrong, or one of the named assets is missing."""
    _check_names(names, pipelines=False)
    click.echo(f"hub: {constants.ENDPOINT}{' (offline)' if constants.is_offline_mode() else ''}")
    click.echo(f"token: {'set' if huggingface_hub.get_token() else 'none'}")
    for line in machine():
        click.echo(line)
    if not names:
        click.echo()
    states = {state for name in names or BUNDLES for state in _report(name, whole=bool(names))}
    if not names and "missing" in states:
        click.echo("\nIts files one by one: python -m models.assets doctor NAME; to get them: fetch in doctor's place")
    if "WRONG" in states or (names and "missing" in states):
        raise SystemExit(1)


def _report(name: str, *, whole: bool) -> set[str]:
    """Say what is there of an asset, file by file; in a line where nothing is, and not the `whole` was asked for."""
    bundle = BUNDLES[name]
    examined = [(asset, *examine(asset, asset_table.ROOT / asset.path)) for asset in bundle.needed()]
    states = {state for _, state, _ in examined}
    if states == {"missing"} and not whole:
        click.echo(f"{name:14} missing  {bundle.about}")
        return states
    click.echo(f"\n{name}: {bundle.about}. Licence: {bundle.licence}")
    for asset, state, remark in examined:
        click.echo(f"  {state:8}{asset.path}  {remark}  ({asset.source})")
    return states


def _check_names(names: Sequence[str], *, pipelines: bool) -> None:
    known = [*BUNDLES, *PIPELINES] if pipelines else [*BUNDLES]
    unknown = [name for name in names if name not in known and not (pipelines and HUB_ID.fullmatch(name))]
    if unknown:
        raise InputError(f"Unknown asset {', '.join(unknown)}. Known: {', '.join(known)}.")


if __name__ == "__main__":
    main()
