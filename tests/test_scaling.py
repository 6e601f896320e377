"""The benchmark of what a second process gains: each figure is of the command and the processes that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import scaling
from errors import InputError

SECONDS = {"1": 6.0, "2": 4.0}


def test_what_one_process_takes_is_divided_by_what_two_take(monkeypatch):
    asked: list[tuple[str, str]] = []

    def said(*command: object) -> str:
        words = [str(word) for word in command]
        told = next(word for word in words if word.startswith("run.num_devices=") or word == "--num-devices")
        number = told.partition("=")[2] or words[words.index(told) + 1]
        asked.append((words[1] if words[0] == "-m" else words[0], number))
        if "training.ppo.launch" not in words:
            return f"3 solvers\nother work in 1.0 s\ndrawn and judged in {SECONDS[number]} s\n"
        [root] = (word.partition("=")[2] for word in words if word.startswith("run.output_root="))
        log = Path(root) / "a-run" / "logs" / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        rows = [{"step": step, "seconds/step": 100.0 if step == 1 else SECONDS[number]} for step in (1, 2, 3)]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ""

    monkeypatch.setattr(scaling, "said", said)
    result = CliRunner().invoke(scaling.main, [], catch_exceptions=False)
    commands = ("training.ppo.launch", "evaluate.py", "benchmarks.tuning_study")
    assert asked == [(command, number) for command in commands for number in ("1", "2")]
    assert result.output.count("6.00 s by one process, 4.00 s by two: 1.50 times as fast") == 3


def test_a_command_that_fails_is_named():
    with pytest.raises(InputError, match="--no-such ended with 2"):
        scaling.said("evaluate.py", "--no-such")
