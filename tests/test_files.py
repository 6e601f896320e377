"""Files that appear whole or not at all: a full disk, a killed writer, a second writer, a loss of power."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from errors import InputError
from files import only_writer, replacing, sweep, write_atomically
from tests.test_import_boundaries import calls_of
from training.runs.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[1]


def another_process(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that has `files` and has come as far as to print a line."""
    code = f"import os, signal, sys, time; from pathlib import Path; import files; path = Path(sys.argv[1]); {code}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "here"
    return process


def killed_while_writing(path: Path, *, folder: bool = False) -> None:
    process = another_process(
        f"context = files.replacing(path, folder={folder}); context.__enter__(); print('here', flush=True); "
        "time.sleep(60)",
        path,
    )
    process.kill()
    process.wait()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "snapshot.json", b"")


def test_the_content_is_on_disk_before_the_name_and_the_name_before_all_else(tmp_path, monkeypatch):
    """Or a loss of power leaves an empty file under the name, or takes the name back that was reported written."""
    events = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*paths):
        events.append("renamed")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "file", b"new")
    assert events == ["file", "renamed", "folder"]


def test_nothing_is_renamed_but_by_what_flushes_it_to_disk():
    of_paths = [entry for entry in calls_of("replace") if len(entry[1].args) == 1 and not entry[1].keywords]
    assert {module for module, _ in (*calls_of("rename"), *of_paths)} == {"files"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with replacing(tmp_path / "made", folder=True) as temporary:
            (temporary / f"{content}.txt").write_text(content)
    with pytest.raises(InputError), replacing(tmp_path / "made", folder=True) as temporary:
        (temporary / "half.txt" / "below it").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "new.txt"]


def test_a_folder_is_made_where_the_file_system_flushes_none(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with replacing(tmp_path / "made", folder=True) as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "made" / "file").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_leaves_is_swept_and_what_a_living_one_writes_is_not(tmp_path, folder):
    killed_while_writing(tmp_path / "checkpoint", folder=folder)
    (left,) = tmp_path.iterdir()
    own = {tmp_path / ".hidden.tmp", tmp_path / "notes.00ff.tmp"}
    for path in own:
        path.touch()
    with replacing(tmp_path / "other", folder=folder) as writing:
        sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {*own, writing}
    assert not left.exists()


def test_the_first_write_to_a_folder_sweeps_it(tmp_path):
    killed_while_writing(tmp_path / "checkpoint")
    write_atomically(tmp_path / "file", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_who_takes_a_folder_of_a_run_sweeps_all_of_it(tmp_path):
    folder = RunFolder.create(tmp_path, "killed", "")
    before = sorted(folder.path.rglob("*"))
    for part in (folder.path, folder.logs, folder.checkpoints, folder.samples):
        killed_while_writing(part / "file")
    with only_writer(folder.path):
        assert sorted(folder.path.rglob("*")) == before


def test_a_folder_has_one_writer_until_that_one_ends(tmp_path):
    process = another_process(
        "held = files.only_writer(path); held.__enter__(); print('here', flush=True); time.sleep(60)", tmp_path
    )
    with pytest.raises(InputError, match="another process is writing to it"), only_writer(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(2):
        with only_writer(tmp_path):
            write_atomically(tmp_path / "file", b"")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
