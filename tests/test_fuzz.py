"""Every kind of file that is read, spoiled at random: it is read, or refused in a message that names it; nothing runs.

python -m pytest tests/test_fuzz.py --fuzz 20000        # inputs in all
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import benchmarks.tuning_runs
import evaluate
import training.ddpm.config
from errors import InputError
from models.checkpoints import read_state_dict
from models.pictures import in_colour, opened_picture, upright
from models.prompts import read_prompts
from models.registry import check_assets
from scripts.verify_images import read_records
from tests.test_distillation import OPTIONS
from training.ddpm.reward_model import load_classifier, new_classifier, save_classifier
from training.distillation_options import OPTIONS as OPTIONS_FILE
from training.distillation_options import load_options
from training.measuring.protocol import load_protocol
from training.ppo.checkpoint import load_checkpoint, save_checkpoint
from training.ppo.config import load_config
from training.ppo.rewards.reward_hps import find_reward_files
from training.ppo.tests.test_checkpoint import state_at
from training.ppo.tests.tiny_world import write_world
from training.runs.run_folder import read_metrics
from training.snapshot import load_snapshot
from training.solver import load_solver

REPOSITORY = Path(__file__).resolve().parents[1]
# Each name stands for ten of the one before: ten thousand million entries in 300 bytes.
LAUGHS = (
    b"{a0: &a0 [x], "
    + b", ".join(b"a%d: &a%d [" % (n, n) + b", ".join([b"*a%d" % (n - 1)] * 10) + b"]" for n in range(1, 11))
    + b"}"
)
TOKENS = [
    *(
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b"9" * 400,
        b"true",
        b'"x"',
        b"[]",
        b"{}",
        b"[" * 5000,
        b"{a: " * 5000,
        b"- " * 5000,
    ),
    *(b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\n", b'"', b"'", b"\t", b":", b","),
    *(b"${oc.env:HOME}", b"???", b"!!python/object/apply:os.system [id]", b"&a [*a]", b"<<: *a", b"0x_", b"12:30"),
    *(b"cos\nsystem\n(Vid\ntR.", b"\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", b"r\xff\xff\xff\x7f", b"PK\x03\x04"),
    LAUGHS,
    *((2**63 - 1).to_bytes(8, "little"), (2**31).to_bytes(4, "big"), b"\0" * 64),
]
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
SECONDS, KIB = 5, 2**20  # the longest time that an input takes; how much more memory the process may take

edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.sampled_from(TOKENS) | st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


def spoiled(content: bytes, changes: list[tuple[float, int, bytes]], kept: float) -> bytes:
    """At each place so many bytes are replaced by others; then the end is cut off."""
    for place, length, others in changes:
        start = round(place * len(content))
        content = content[:start] + others + content[start + length :]
    return content[: round(kept * len(content))]


@dataclass(frozen=True)
class Kind:
    """A kind of file: a good one, how it is read, and what of it is spoiled (all of it, unless `wrapped` says more)."""

    path: Path
    read: Callable[[Path], object]
    content: bytes
    wrapped: Callable[[bytes], bytes] = bytes


def rewrapped(archive: bytes) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The pickle in what torch saved, and how another one takes its place, its checksum right."""
    entries = zipfile.ZipFile(io.BytesIO(archive))
    (pickled,) = (name for name in entries.namelist() if name.endswith("data.pkl"))

    def wrapped(other: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as written:
            for name in entries.namelist():
                written.writestr(name, other if name == pickled else entries.read(name))
        return buffer.getvalue()

    return entries.read(pickled), wrapped


def picture(path: Path) -> object:
    with opened_picture(path) as image:
        return in_colour(upright(image))


PROTOCOL_OPTIONS = [option.removeprefix("--") for parameter in evaluate.main.params for option in parameter.opts]
READERS: dict[str, Callable[[Path], object]] = {
    "start/network-snapshot-000001.pkl": load_snapshot,
    "start/network-snapshot-000001.json": load_solver,
    "policy-step000003.pt": load_checkpoint,
    "classifier.pt": lambda path: load_classifier(path, "path.rm", torch.device("cpu")),
    "weights.safetensors": read_state_dict,
    "reward.pt": read_state_dict,
    "reward.json": lambda path: find_reward_files(path.with_suffix(".pt")),
    "config.yaml": load_config,
    "ddpm.yaml": training.ddpm.config.SCHEMA.load,
    "study.yaml": benchmarks.tuning_runs.SCHEMA.load,
    "protocol.yaml": lambda path: load_protocol(str(path), PROTOCOL_OPTIONS),
    "--override": lambda path: load_config(path.parent / "config.yaml", [path.read_bytes().decode(errors="replace")]),
    "prompts.txt": read_prompts,
    "prompts.csv": read_prompts,
    "metrics.jsonl": read_metrics,
    "images.jsonl": lambda path: read_records(path.parent),
    OPTIONS_FILE: lambda path: load_options(path.parent),
    "picture.png": picture,
    "picture.jpg": picture,
    "picture.webp": picture,
    "model/model_index.json": lambda path: check_assets(str(path.parent)),
    "model/unet/config.json": lambda path: check_assets(str(path.parents[1])),
    "model/scheduler/scheduler_config.json": lambda path: check_assets(str(path.parents[1])),
    "model/unet/diffusion_pytorch_model.safetensors": lambda path: check_assets(str(path.parents[1])),
}
ARCHIVES = {name: f"the pickle in {name}" for name in ("policy-step000003.pt", "classifier.pt")}
NAMES = [*READERS, *ARCHIVES.values()]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """A good file of every kind, by name."""
    root = tmp_path_factory.mktemp("fuzz")
    write_world(root)
    save_checkpoint(root / "policy-step000003.pt", state_at(3))
    save_classifier(root / "classifier.pt", new_classifier((8, 8), 4, 0), {})
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(1)}, root / "weights.safetensors")
    (root / OPTIONS_FILE).write_text(json.dumps(asdict(OPTIONS)))
    (root / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "kl": 0.{step}, "table": [1, 2]}}\n' for step in range(4))
    )
    (root / "images.jsonl").write_text('{"file": "1.png", "prompt": "a dog", "seed": 3}\n')
    (root / "prompts.txt").write_text("a dog\n\ntwo cats\n")
    (root / "prompts.csv").write_text('id,text\n1,"a dog, a cat"\n2,two cats\n')
    (root / "--override").write_text("reward.mix={aesthetic: 0.5}")
    shutil.copy(REPOSITORY / "configs" / "smoke.yaml", root / "ddpm.yaml")
    shutil.copy(REPOSITORY / "benchmarks" / "studies" / "shapes.yaml", root / "study.yaml")
    shutil.copy(REPOSITORY / "evaluations" / "shapes.yaml", root / "protocol.yaml")
    for suffix in ("png", "jpg", "webp"):
        Image.effect_noise((20, 12), 90).convert("RGB").save(root / f"picture.{suffix}")
    found = {name: Kind(root / name, read, (root / name).read_bytes()) for name, read in READERS.items()}
    for name in ARCHIVES:
        kind = found[name]
        found[ARCHIVES[name]] = Kind(kind.path, kind.read, *rewrapped(kind.content))
    return found


class Guard:
    """While it is on, hears of what no file that is read may start or write."""

    def __init__(self) -> None:
        self.on, self.heard = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.on and (event in FORBIDDEN or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))):
            self.heard.append((event, arguments))


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard()


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_file_is_read_or_refused_by_name(kinds: dict[str, Kind], guard: Guard, name: str, fuzz: int):
    kind = kinds[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def try_one(changes: list[tuple[float, int, bytes]], kept: float) -> None:
        kind.path.write_bytes(kind.wrapped(spoiled(kind.content, changes, kept)))
        refusal = None
        start, guard.on = time.process_time(), True
        try:
            kind.read(kind.path)
        except InputError as error:
            refusal = str(error)
        finally:
            guard.on = False
        assert refusal is None or kind.path.name in refusal or kind.path.parent.name in refusal
        assert time.process_time() - start < SECONDS
        assert not guard.heard

    number = max(1, round(fuzz / len(NAMES)))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    many = settings(max_examples=number, deadline=None, database=None, suppress_health_check=checks)
    try:
        kind.read(kind.path)
        for token in TOKENS[:: 6 if name.startswith("model/") else 1]:  # a look at a whole pipeline takes its time
            try_one([(0, len(kind.content), token)], 1)
        many(given(changes=edits, kept=st.just(1.0) | st.floats(0, 1))(try_one))()
    finally:
        kind.path.write_bytes(kind.wrapped(kind.content))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIB
