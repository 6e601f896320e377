"""The house: imports run downward only. Read from the source, nothing is imported.

    floor 4   *.py in the root, scripts/       command lines
    floor 3   training/ppo/, training/ddpm/    reinforcement learning
    floor 2   training/                        predictor, its files, its distillation, statistics
    floor 1   models/                          frozen diffusion models
    floor 0   errors.py, files.py, interrupts.py, solvers.py, schedules.py; the last two import nothing of ours
              integrations/                    what is copied into other programs: nor does this

`training.ppo` is imported by nobody but itself, the command lines, and training/ddpm, which may use its `algorithm`.
Tests may import everything, and nothing but tests may import them. Rooms that do not exist yet bind nobody.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("models", "training", "scripts", "benchmarks", "integrations", "tests")
GROUND_FLOOR = ("errors", "files", "interrupts", "solvers", "schedules")
TESTS, COMMAND_LINES = 5, 4


def floor_of(module: str) -> int:
    """The floor of a dotted module name of ours."""
    room, *inside = module.split(".")
    if room in ("tests", "conftest") or "tests" in inside:
        return TESTS
    if room in (*GROUND_FLOOR, "integrations"):
        return 0
    if room == "models":
        return 1
    if room == "training":
        return 3 if inside[:1] in (["ppo"], ["ddpm"]) else 2
    return COMMAND_LINES


def source_files(root: Path) -> list[Path]:
    """Every Python file of the project, in the root and its code folders."""
    inside = (path for folder in CODE_FOLDERS for path in (root / folder).rglob("*.py"))
    return sorted([*root.glob("*.py"), *inside])


def module_name(path: Path, root: Path) -> str:
    """`training/ppo/__init__.py` -> `training.ppo`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, by statement or by `import_module("...")`.

    `from a import b` gives `a.b`, be b a module or not; relative imports are resolved against `package`.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def calls_of(method: str) -> Iterator[tuple[str, ast.Call]]:
    """(module, call) of every `something.method(...)` in the project's code, tests left out."""
    for path in source_files(REPOSITORY):
        module = module_name(path, REPOSITORY)
        if floor_of(module) != TESTS:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(func=ast.Attribute(attr=name)) if name == method:
                        yield module, node


def within(module: str, room: str) -> bool:
    """Whether a dotted name is the room or lies in it."""
    return module == room or module.startswith(f"{room}.")


def fault(importer: str, imported: str) -> str | None:
    """What is wrong with one module of ours importing another, or None."""
    own, other = floor_of(importer), floor_of(imported)
    if own == TESTS:
        return None
    if importer in ("solvers", "schedules"):
        return "the ground floor's solvers and schedules import nothing of ours"
    if within(importer, "integrations") and not within(imported, "integrations"):
        return "what is copied into other programs imports nothing of ours"
    if other > own:
        return f"floor {own} imports floor {other}: imports run downward only"
    inside = within(importer, "training.ppo")
    if inside and within(imported, "training.ddpm"):
        return "training.ppo does not know training.ddpm"
    if within(imported, "training.ppo") and not inside and own != COMMAND_LINES:
        shared = within(importer, "training.ddpm") and within(imported, "training.ppo.algorithm")
        return None if shared else "training.ppo is isolated: of it training.ddpm may use the algorithm, and no more"
    return None


def violations(root: Path) -> list[str]:
    """Every import that breaks the rules, as `file:line imports module: why`."""
    files = source_files(root)
    ours = {module_name(path, root).split(".")[0] for path in files} | set(CODE_FOLDERS) | set(GROUND_FLOOR)
    found = []
    for path in files:
        importer = module_name(path, root)
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for line, imported in imported_names(path, package):
            why = fault(importer, imported) if imported.split(".")[0] in ours else None
            if why:
                found.append(f"{path.relative_to(root).as_posix()}:{line} imports {imported}: {why}")
    return found


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


GOOD_HOUSE = {
    "errors.py": "import click\n",
    "solvers.py": "import math\nfrom torch import Tensor\n",
    "schedules.py": "import torch\n",
    "integrations/diffusers/pipeline.py": "import diffusers\nfrom .scheduling import Scheduler\n",
    "integrations/diffusers/scheduling.py": "import torch\n",
    "models/__init__.py": "from models.denoiser import Denoiser\n",
    "models/denoiser.py": "from errors import InputError\nfrom . import loading\n",
    "models/loading.py": "import schedules\n",
    "training/__init__.py": "",
    "training/networks.py": "from solvers import EPDTable\nfrom models import load_denoiser\n",
    "training/ppo/__init__.py": "",
    "training/ppo/algorithm.py": "import torch\n",
    "training/ppo/policy.py": "from training.networks import EPD_predictor\nfrom .algorithm import clipped\n",
    "training/ppo/tests/test_policy.py": "from tests import golden\nimport sample\n",
    "training/ddpm/trainer.py": "from training.ppo.algorithm import clipped\nfrom training.ppo import algorithm\n",
    "sample.py": "from training.ppo.policy import EPDParamPolicy\nimport solvers\nimport train\n",
    "scripts/bench.py": "from training.ppo import launch\n",
    "tests/test_sample.py": "import sample\nfrom training.ppo import policy\n",
}

BREACHES = [
    ("solvers.py", "import errors", "import nothing of ours"),
    ("solvers.py", "from schedules import get_schedule", "import nothing of ours"),
    ("schedules.py", "def f():\n    from models import loading", "import nothing of ours"),
    ("errors.py", "import models", "floor 0 imports floor 1"),
    ("integrations/diffusers/scheduling.py", "from solvers import EPDTable", "other programs imports nothing of ours"),
    ("models/loading.py", "from training.snapshot import load_snapshot", "floor 1 imports floor 2"),
    ("models/loading.py", "from ..training import networks", "floor 1 imports floor 2"),
    ("models/shapes/scenes.py", "import training.ppo.policy as policy", "floor 1 imports floor 3"),
    ("models/shapes/scenes.py", "import importlib\nimportlib.import_module('sample')", "floor 1 imports floor 4"),
    ("training/networks.py", "from training.ppo import policy", "floor 2 imports floor 3"),
    ("training/networks.py", "from .ppo.policy import EPDParamPolicy", "floor 2 imports floor 3"),
    ("training/networks.py", "if TYPE_CHECKING:\n    import sample", "floor 2 imports floor 4"),
    ("training/ppo/policy.py", "from sample import main", "floor 3 imports floor 4"),
    ("training/ppo/policy.py", "from training.ddpm import trainer", "does not know training.ddpm"),
    ("training/ppo/policy.py", "from tests import golden", "floor 3 imports floor 5"),
    ("training/ddpm/trainer.py", "from training.ppo import policy", "may use the algorithm, and no more"),
    ("training/ddpm/trainer.py", "import training.ppo", "may use the algorithm, and no more"),
    ("sample.py", "from training.ppo.tests import test_policy", "floor 4 imports floor 5"),
]


def test_this_house_is_in_order() -> None:
    assert violations(REPOSITORY) == []


def test_no_package_stands_outside_the_plan() -> None:
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert packages <= set(CODE_FOLDERS)


def test_a_house_in_order_passes(tmp_path: Path) -> None:
    write(tmp_path, GOOD_HOUSE)
    assert violations(tmp_path) == []


def test_an_empty_house_passes(tmp_path: Path) -> None:
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("file", "line", "why"), BREACHES)
def test_each_breach_is_found(tmp_path: Path, file: str, line: str, why: str) -> None:
    write(tmp_path, {**GOOD_HOUSE, file: f"{GOOD_HOUSE.get(file, '')}{line}\n"})
    (found,) = violations(tmp_path)
    assert found.startswith(f"{file}:")
    assert why in found
