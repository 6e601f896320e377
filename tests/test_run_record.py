"""What a run writes down: a disk that is full for a while costs lines, never the run."""

import errno
import os

import pytest

from errors import InputError
from training.runs.record import RunRecord
from training.runs.run_folder import RunFolder, read_metrics

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def record(tmp_path):
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    return RunRecord(folder, "epoch")


def test_a_row_that_cannot_be_written_is_said_and_written_with_the_next_one(record, caplog):
    record.row({"step": 1, "reward": 0.1})
    away = record.folder.logs.rename(record.folder.path / "away")
    record.row({"step": 2, "reward": 0.2})
    assert [message.split(":")[0] for message in caplog.messages] == ["metrics", "TensorBoard"]
    away.rename(record.folder.logs)
    record.row({"step": 3, "reward": 0.3})
    assert [row["step"] for row in read_metrics(record.folder.metrics)] == [1, 2, 3]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, FULL), InputError(FULL)])
def test_what_cannot_be_drawn_for_tensorboard_does_not_end_a_run(record, fault, monkeypatch, caplog):
    def refuse(*_):
        raise fault

    monkeypatch.setattr("training.runs.record.EventFile", refuse)
    record.row({"step": 1, "reward": 0.1})
    assert [row["step"] for row in read_metrics(record.folder.metrics)] == [1]
    (said,) = caplog.messages
    assert said.startswith("TensorBoard: ")
    assert FULL in said


def test_a_checkpoint_that_could_not_be_saved_is_due_until_it_is_and_the_last_one_must_be(record, caplog):
    def refuse():
        raise InputError(FULL)

    written = []
    record.save(2, refuse, last=False)
    assert caplog.messages == [f"no checkpoint of epoch 2, it is tried again later: {FULL}"]
    assert record.is_due(3, 2)
    record.save(3, lambda: written.append(3), last=False)
    record.save(3, lambda: written.append("again"), last=True)
    assert (written, record.is_due(3, 2), record.is_due(4, 2)) == ([3], False, True)
    with pytest.raises(InputError, match=FULL):
        record.save(4, refuse, last=True)
