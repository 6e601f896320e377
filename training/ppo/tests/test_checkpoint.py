"""Checkpoints and the run's folder: round trips, cut-off and forged files, a full disk, rewinding the log."""

import errno
import json
import os
import shlex
from pathlib import Path

import pytest
import torch

from errors import InputError
from solvers import EPDTable
from training.ppo.checkpoint import KEYS, load_checkpoint, save_checkpoint, table_from_plain, table_to_plain
from training.runs.checkpoint import best_path, list_checkpoints, newest_checkpoint, set_aside, step_path
from training.runs.run_folder import MetricsLog, RunFolder, read_metrics, seconds_by_phase

TABLE = EPDTable(torch.tensor([[0.3, 0.6]]).double(), torch.tensor([[0.5, 0.5]]).double())


def state_at(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    torch.randn(3, generator=generator)
    return {
        "step": step,
        "trainer": {"weights": torch.linspace(0, 1, 7, dtype=torch.float64), "random": generator.get_state()},
        "watch": None,
        "start": {"metadata": {"dataset_name": "shapes", "M": 3, "afs": False}},
        "table": table_to_plain(TABLE),
        "config": {"ppo": {"steps": 3}},
        "config_hash": "ab",
    }


class Touch:
    """Unpickled by a plain reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.path),)


def test_round_trip_is_exact(tmp_path: Path):
    save_checkpoint(step_path(tmp_path, 12), state_at(12))
    read = load_checkpoint(tmp_path / "policy-step000012.pt")
    written = state_at(12)
    assert read.keys() == KEYS
    assert torch.equal(read["trainer"]["weights"], written["trainer"]["weights"])
    assert read["trainer"]["weights"].dtype == torch.float64
    assert torch.equal(table_from_plain(read["table"]).positions, TABLE.positions)
    assert table_from_plain(read["table"]).scale_dir is None
    resumed, never_stopped = torch.Generator(), torch.Generator()
    resumed.set_state(read["trainer"]["random"])
    never_stopped.set_state(written["trainer"]["random"])
    assert torch.equal(torch.randn(5, generator=resumed), torch.randn(5, generator=never_stopped))
    assert [path.name for path in tmp_path.iterdir()] == ["policy-step000012.pt"]


def test_newest_is_the_largest_step_not_the_largest_name(tmp_path: Path):
    for step in (2, 999_999, 1_000_000):
        save_checkpoint(step_path(tmp_path, step), state_at(step))
    save_checkpoint(best_path(tmp_path), state_at(2))
    assert newest_checkpoint(tmp_path) == step_path(tmp_path, 1_000_000)
    assert len(list_checkpoints(tmp_path)) == 3


def test_no_checkpoint_yet(tmp_path: Path):
    with pytest.raises(InputError, match="ended before its first checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_corrupt_checkpoint_is_named_and_the_one_before_offered(tmp_path: Path, share: float):
    for step in (10, 20, 30):
        save_checkpoint(step_path(tmp_path, step), state_at(step))
    for broken in (step_path(tmp_path, 20), step_path(tmp_path, 30)):
        content = broken.read_bytes()
        broken.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught:
        load_checkpoint(step_path(tmp_path, 30))
    assert "policy-step000030.pt: the checkpoint is corrupt" in str(caught.value)
    assert f"--resume {step_path(tmp_path, 10)}" in str(caught.value)
    assert load_checkpoint(step_path(tmp_path, 10))["step"] == 10


def test_a_checkpoint_is_offered_as_it_is_typed(tmp_path: Path):
    folder = tmp_path / "my runs"
    save_checkpoint(step_path(folder, 10), state_at(10))
    with pytest.raises(InputError) as caught:
        load_checkpoint(step_path(folder, 20))
    assert shlex.split(str(caught.value).split("--resume ")[1]) == [str(step_path(folder, 10))]


def test_corrupt_first_checkpoint_has_none_before_it(tmp_path: Path):
    step_path(tmp_path, 10).write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="no readable checkpoint before it"):
        load_checkpoint(step_path(tmp_path, 10))


def test_forged_checkpoint_runs_nothing(tmp_path: Path):
    torch.save({"format": 2, "step": Touch(tmp_path / "made")}, step_path(tmp_path, 1))
    with pytest.raises(InputError, match="corrupt"):
        load_checkpoint(step_path(tmp_path, 1))
    assert not (tmp_path / "made").exists()


def test_other_files_are_no_checkpoints(tmp_path: Path):
    torch.save({"weights": torch.zeros(2)}, step_path(tmp_path, 1))
    with pytest.raises(InputError, match="no checkpoint of the RL job"):
        load_checkpoint(step_path(tmp_path, 1))
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(step_path(tmp_path, 2))


def test_only_plain_values_are_written(tmp_path: Path):
    with pytest.raises(ValueError, match="plain values only"):
        save_checkpoint(step_path(tmp_path, 1), {**state_at(1), "watch": tmp_path})
    with pytest.raises(ValueError, match="a checkpoint holds"):
        save_checkpoint(step_path(tmp_path, 1), {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = step_path(tmp_path, 1)
    save_checkpoint(path, state_at(1))

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match="No space left on device"):
        save_checkpoint(path, state_at(1) | {"config_hash": "cd"})
    assert load_checkpoint(path)["config_hash"] == "ab"
    assert len(list(tmp_path.iterdir())) == 1


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = [RunFolder.create(tmp_path, "run", "") for _ in range(2)]
    assert folders[0].path != folders[1].path
    assert all(folder.path.name.endswith("-run") for folder in folders)


def test_folder_opens_by_itself_and_by_a_checkpoint(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "exps", "trial", "run: {}\n")
    assert folder.path.name.endswith("-trial")
    assert folder.config.read_text() == "run: {}\n"
    assert RunFolder.open(folder.path) == folder
    assert RunFolder.open(step_path(folder.checkpoints, 3)) == folder
    with pytest.raises(InputError, match="no folder of a run"):
        RunFolder.open(tmp_path)


def test_seconds_by_phase_add_up_to_the_steps():
    rows = [
        {"step": 0},
        {"step": 1, "seconds/step": 2.0, "seconds/network": 1.5, "seconds/text": 0.25},
        {"step": 2, "seconds/step": 4.0, "seconds/network": 3.5},
    ]
    assert list(seconds_by_phase(rows).items()) == [("network", 2.5), ("other", 0.375), ("text", 0.125)]
    assert seconds_by_phase(rows[:1]) == {}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\nb", "x" * 300])
def test_run_names_are_plain_names(tmp_path: Path, name: str):
    with pytest.raises(InputError, match=r"run\.run_name"):
        RunFolder.create(tmp_path, name, "")


def test_output_root_that_is_a_file(tmp_path: Path):
    (tmp_path / "exps").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.create(tmp_path / "exps", "trial", "")


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_filled_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
):
    def refuse(descriptor: int) -> None:
        raise fault

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises((InputError, KeyboardInterrupt)):
        RunFolder.create(tmp_path / "exps", "trial", "run: {}\n")
    assert list((tmp_path / "exps").iterdir()) == []


def test_metrics_survive_a_disk_that_is_full_for_a_while(tmp_path: Path):
    log = MetricsLog(tmp_path / "logs" / "metrics.jsonl")
    with pytest.raises(InputError, match="1 rows wait in memory"):
        log.append({"step": 1})
    log.path.parent.mkdir()
    log.append({"step": 2})
    assert read_metrics(log.path) == [{"step": 1}, {"step": 2}]


def test_rewinding_keeps_a_copy_of_what_it_takes_back(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.append({"step": step, "reward": step / 3})
    assert log.rewind(3) == 2
    log.append({"step": 4, "reward": 0.0})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4]
    assert len(read_metrics(tmp_path / "metrics-before-resume-at-step000003.jsonl")) == 5


def test_every_way_that_was_gone_from_one_step_is_kept(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 3})
    for way in (1, 2):
        log.append({"step": 4, "reward": way})
        step_path(tmp_path, 4).write_text(f"way {way}")
        log.rewind(3)
        set_aside(tmp_path, 3)
    kept = [path.read_text() for path in sorted(tmp_path.glob("before-resume-at-step000003*/*"))]
    logs = [read_metrics(path)[-1]["reward"] for path in sorted(tmp_path.glob("metrics-*"), reverse=True)]
    assert (kept, logs) == (["way 1", "way 2"], [1, 2])


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 2, "rew',
        b"\x00\x00\x00",
        b'{"step": 2, "reward": \xff}',
        b"[" * 5000,
        b"",
        b'{"stop": 2}',
        b'{"step": true}',
    ],
)
def test_a_damaged_row_is_set_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1, "reward": 0.1}\n' + damaged + b'\n{"step": 3}\n{"step": 4, "rewa'
    path.write_bytes(content)
    assert MetricsLog(path).rewind(3) == 0
    assert read_metrics(path) == [{"step": 1, "reward": 0.1}, {"step": 3}]
    copy = tmp_path / "metrics-before-resume-at-step000003.jsonl"
    assert copy.read_bytes() == content
    assert f"{path}: line 2 is damaged and left out; the file as it was is kept in {copy.name}" in caplog.text


def test_only_a_newline_ends_a_row(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "note": "a\u2028b\u2029c\x85d"}, {"step": 2}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_metrics(path) == rows


def test_cut_off_last_row_is_left_out_any_other_is_an_error(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "rew')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st\n' + json.dumps({"step": 2}) + "\n")
    with pytest.raises(InputError, match="line 1"):
        read_metrics(path)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
