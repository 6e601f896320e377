"""Commands that are killed, interrupted, stopped, or lose their disk at any operation end as if nothing had happened.

python -m pytest tests/faults -s --faults 20        # strikes a command; `all`: each kind of strike at every operation
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.commands import COMMANDS, REPOSITORY, left, without_time, write_everything
from tests.faults.strikes import FULL, FULL_FOR_EVER, GONE, READ_ONLY, REMOVING, SIGNALS, TORN, Job, Server

KINDS = [*SIGNALS, TORN, FULL, FULL_FOR_EVER, GONE, READ_ONLY]
MOMENTS = 10  # of each signal's, besides those at operations
DEADLY = ("kill", TORN)
COMPLETE = re.compile(r"complete, \d+ of|nothing to resume")
NOBODY = 65534 if os.getuid() == 0 else None  # root may write to what is read-only
CUT = {"launch": 0.8, "train": 0.7, "finetune": 0.8}  # after what share of its operations each is killed
WHAT_MAY_BE_MISSING = re.compile(r"/samples/")  # after a disk had no room for a while


class Whole(NamedTuple):
    """A command that nothing strikes: its operations, what it leaves, and how long it takes."""

    trace: list[str]
    left: dict[str, str]
    seconds: float


class Scene:
    """The commands' world, the process that carries them out, and what each leaves that nothing strikes."""

    def __init__(self, root: Path) -> None:
        self.root, self.world, self.number = root, root / "world", 0
        self.whole: dict[str, Whole] = {}
        write_everything(self.world)
        self.server = Server([command.module for command in COMMANDS.values()], REPOSITORY)

    def folder(self) -> Path:
        self.number += 1
        path = self.root / f"{self.number}"
        path.mkdir()
        return path

    def carry_out(self, name: str, folder: Path, arguments: str | None = None, **strike: object) -> tuple[int, str]:
        """Status and output of a command in a folder."""
        command = COMMANDS[name]
        told = shlex.split((arguments or command.begin).format(world=self.world))
        log, trace = (f"{folder}.{kind}" for kind in ("log", "trace"))
        status = self.server.carry_out(Job(command.module, told, str(folder), log, trace, **strike))
        return status, Path(log).read_text(errors="replace")

    def undisturbed(self, name: str) -> Whole:
        """What a command does that nothing strikes."""
        if name not in self.whole:
            if name == "finetune" and not (self.world / "classifier.pt").exists():
                self.undisturbed("train_reward_model")
            folder, start = self.folder(), time.monotonic()
            status, said = self.carry_out(name, folder)
            assert status == 0, said
            trace = Path(f"{folder}.trace").read_text().splitlines()
            self.whole[name] = Whole(trace, left(folder), time.monotonic() - start)
            for file in folder.glob("reward*.pt"):
                shutil.copy(file, self.world / file.name.replace("reward", "classifier"))
        return self.whole[name]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    root.chmod(0o755)  # one of the commands has another user
    made = Scene(root)
    yield made
    made.server.close()
    shutil.rmtree(root)


def applies(kind: str, operation: str, *, changed: bool) -> bool:
    """Whether a strike before an operation can differ from the one before; `changed`: whether the disk has since."""
    if kind == TORN:
        return operation == "write"
    if kind in (FULL, FULL_FOR_EVER):
        return operation not in ("read", *REMOVING)
    return changed or kind in ("term", "int", "stop")


def strikes(name: str, whole: Whole, wanted: str) -> list[tuple[str, float]]:
    """Kinds, and operations or moments: all that can differ, or a selection, always the same, with kinds in turn."""
    every: dict[str, list[tuple[str, float]]] = {kind: [] for kind in KINDS}
    changed = False
    for number, line in enumerate(whole.trace, start=1):
        mark, operation, _ = line.split(" ", 2)
        for kind in KINDS:
            if applies(kind, operation, changed=changed):
                every[kind].append((kind, number))
        changed = mark == "+"
    for kind in SIGNALS:
        every[kind] += [(kind, round(whole.seconds * share / MOMENTS) + 0.5) for share in range(MOMENTS)]
    if wanted == "all":
        return [strike for kind in KINDS for strike in every[kind]]
    draw, first = random.Random(name), list(COMMANDS).index(name) * int(wanted)
    return [draw.choice(every[KINDS[(first + turn) % len(KINDS)]]) for turn in range(int(wanted))]


def difference(scene: Scene, name: str, kind: str, at: float) -> str | None:
    """Strike a command once, go on, and say what is then not as it should be."""
    folder, expected = scene.folder(), scene.undisturbed(name).left
    user = NOBODY if kind == READ_ONLY else None
    if user is not None:
        os.chown(folder, user, user)
    status, said = scene.carry_out(name, folder, strike=kind, at=at, user=user)
    fine = (
        {-9} if kind in DEADLY else {0} if kind == "stop" else {0, 128 + SIGNALS[kind]} if kind in SIGNALS else {0, 2}
    )
    if status not in fine or "Traceback" in said:
        return f"ends with {status}: {said[-2000:]}"
    if status == 2 and not re.search(r"\nError: .+\n*\Z", f"\n{said}"):
        return f"does not end with one line: {said[-2000:]}"
    if kind == GONE:
        shutil.rmtree(folder)
        Path(f"{folder}.gone").rename(folder)
    for path in (folder, *folder.rglob("*")) if kind == READ_ONLY else ():
        path.chmod(0o755 if path.is_dir() else 0o644)
    lenient = kind in (FULL, FULL_FOR_EVER, GONE, READ_ONLY)
    if (status or kind == GONE) and (wrong := went_on(scene, name, folder)):
        return wrong
    found = left(folder)
    wrong = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
    wrong = [path for path in wrong if not (lenient and WHAT_MAY_BE_MISSING.search(path))]
    shutil.rmtree(folder)
    return f"leaves other files: {sorted(wrong)}" if wrong else None


def went_on(scene: Scene, name: str, folder: Path) -> str | None:
    """Do what the user would do; what goes wrong then."""
    status, said = scene.carry_out(name, folder, COMMANDS[name].go_on(folder))
    return None if status == 0 or COMPLETE.search(said) else f"does not go on: {status}: {said[-2000:]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_struck_command_that_goes_on_ends_as_one_that_was_not(scene: Scene, name: str, faults: str):
    whole = scene.undisturbed(name)
    tried = strikes(name, whole, faults)
    wrong = []
    for kind, at in tried:
        if what := difference(scene, name, kind, at):
            wrong.append(f"{kind} at {at:g} ({whole.trace[at - 1] if isinstance(at, int) else 'seconds'}): {what}")
    print(f"{name}: {len(whole.trace)} operations, {len(tried)} strikes, {len(wrong)} differences")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CUT)
def test_a_run_goes_on_beside_a_file_that_was_cut_off_or_names_it(scene: Scene, name: str, faults: str):
    """Each file that a killed run has left, cut at every 100th byte."""
    whole, folder = scene.undisturbed(name), scene.folder()
    scene.carry_out(name, folder, strike="kill", at=round(CUT[name] * len(whole.trace)))
    kept = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    cuts = [(path, end) for path in kept for end in range(0, (folder / path).stat().st_size, 100)]
    if faults != "all":
        cuts = random.Random(name).sample(cuts, min(int(faults), len(cuts)))
    wrong = []
    for path, end in cuts:
        copy = Path(shutil.copytree(folder, scene.folder(), dirs_exist_ok=True))
        os.truncate(copy / path, end)
        status, said = scene.carry_out(name, copy, COMMANDS[name].go_on(copy))
        refused = status == 2 and "Traceback" not in said and path.name in said.replace("\n", "")
        found = left(copy)
        differing = [file for file, content in whole.left.items() if found.get(file) != content]
        if not refused and (status or set(differing) - {without_time(str(path))}):
            wrong.append(f"{path} cut at {end}: {status}, {differing}: {said[-1000:]}")
        shutil.rmtree(copy)
    print(f"{name}: {len(kept)} files, {len(cuts)} cuts, {len(wrong)} differences")
    assert not wrong, "\n".join(wrong)
