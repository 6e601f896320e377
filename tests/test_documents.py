"""README and docs: short enough, their links lead somewhere, their Python and their commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / name
    for name in (
        *("README.md", "guide2.md", "docs/commands.md", "docs/promises.md", "docs/results.md", "docs/how-to/sd15.md"),
        *("docs/how-to/gpu.md", "integrations/diffusers/README.md", "integrations/comfyui/README.md", "quickstart.sh"),
    )
]
PAGES += [REPOSITORY / "docs" / "how-to" / name for name in ("evaluate.md", "gpu.md", "sd15.md")]
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
COMMAND = re.compile(r"^(?: {4})?python (?:-m (?P<module>[\w.]+)|(?P<script>\w+)\.py)(?P<options>[^\n]*)", re.MULTILINE)
NO_CLICK = ("pytest", "training.ppo.tests")  # they have commands of another kind
# Where a page shows it, an output or a comment begins.
COMMENT = re.compile(r"\s{2,}#|\s+# ")
CONTINUED = re.compile(r" *\\\n *")
# What the reader puts in, or makes before.
OPEN = re.compile(r"<|\$|\b(RUN|FOLDER|HELDOUT|OWNER|ISSUE)\b|\.\.\.|exps/sd3")
SHORTENED = {
    "training.ppo.launch": ["--dry-run"],
    "evaluate": ["--dry-run"],
    "train": ["--dry-run"],
    "sample": [],
    "scripts.show_solver": [],
    "scripts.show_interval": [],
    "scripts.export_diffusers": [],
}
"""Commands that are run here as they stand, and what is added where they are not short already."""
RUN_BY = {
    "benchmarks.budget": "tests/test_budget.py",
    "benchmarks.ddpm_study": "tests/ddpm/test_study.py",
    "benchmarks.distilled_multistep": "tests/test_mixture.py",
    "benchmarks.estimators": "tests/test_estimators.py",
    "benchmarks.gpu_hour": "tests/test_gpu_hour.py",
    "benchmarks.linearity": "tests/test_linearity.py",
    "benchmarks.screen_shapes": "tests/test_screen_shapes.py",
    "benchmarks.per_prompt": "tests/test_per_prompt.py",
    "benchmarks.rehearse_evaluation": "tests/test_rehearsal.py",
    "benchmarks.rehearse_sd15": "tests/test_rehearsal.py",
    "benchmarks.scaling": "tests/test_scaling.py",
    "benchmarks.soak": "tests/test_soak.py",
    "benchmarks.tuning_study": "tests/test_tuning_study.py",
    "download_hpsv2_weights": "tests/test_assets.py",
    "evaluate": "tests/test_evaluate_command.py",
    "launch_rl.sh": "tests/test_rehearsal.py",
    "models.assets": "tests/test_assets.py",
    "models.shapes.train_autoencoder": "tests/test_shapes_training.py",
    "models.shapes.train_ddpm": "tests/ddpm/test_train_ddpm.py",
    "models.shapes.train_diffusion": "tests/test_shapes_training.py",
    "models.shapes.train_flow": "tests/test_shapes_flow.py",
    "models.shapes.train_reward": "tests/test_shapes_training.py",
    "models.shapes.write_prompts": "tests/test_shapes_scenes.py",
    "run_tests.sh": ".ci/run",
    "sample": "tests/test_sample_command.py",
    "scripts.eval": "tests/ddpm/test_commands.py",
    "scripts.export_diffusers": "tests/test_diffusers_export.py",
    "scripts.finetune": "tests/ddpm/test_commands.py",
    "scripts.image_statistics": "tests/test_real_images.py",
    "scripts.push_to_hub": "tests/test_push_to_hub.py",
    "scripts.train_reward_model": "tests/ddpm/test_commands.py",
    "scripts.verify_images": "tests/test_verify_images_command.py",
    "training.ppo.export_epd_predictor": "training/ppo/tests/test_export_predictor.py",
    "training.ppo.launch": "training/ppo/tests/test_launch.py",
}
"""What runs the other commands: those that the reader completes, and those that take long."""


def test_the_readme_is_for_newcomers() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def commands() -> list[tuple[str, str, str]]:
    """(page, module, its options) of every command that a page shows."""
    found = []
    for page in PAGES:
        for match in COMMAND.finditer(CONTINUED.sub(" ", page.read_text())):
            module = match["module"] or match["script"]
            if not module.startswith(NO_CLICK):
                found.append((page.name, module, COMMENT.split(match["options"])[0].strip()))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "module", "options"), commands(), ids=lambda text: text[:40])
def test_a_command_has_the_options_that_a_page_shows(page: str, module: str, options: str) -> None:
    main = import_module(module).main
    assert isinstance(main, click.Command)
    given = [word.split("=")[0] for word in shlex.split(options) if re.match(r"--?[a-zA-Z]", word)]
    known = {name for option in main.params for name in (*option.opts, *option.secondary_opts)}
    if isinstance(main, click.Group):
        known |= {name for command in main.commands.values() for option in command.params for name in option.opts}
    assert set(given) <= known | {"--help"}


def written_out() -> list[tuple[str, str]]:
    """(module, options) of the commands that are run here."""
    found = {(module, options) for _, module, options in commands() if not OPEN.search(options)}
    return sorted((module, options) for module, options in found if module in SHORTENED)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, where commands may write."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in REPOSITORY.iterdir():
        if path.name not in ("exps", "outputs", ".git"):
            (folder / path.name).symlink_to(path)
    for run in (REPOSITORY / "exps").glob("0000[0-9]-*"):
        shutil.copytree(run, folder / "exps" / run.name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("module", "options"), written_out(), ids=lambda text: text[:60])
def test_a_command_runs_as_it_stands(
    module: str, options: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    words = shlex.split(options)
    words += [] if {"--dry-run", "--init-only"} & {*words} else SHORTENED[module]
    result = CliRunner().invoke(import_module(module).main, words)
    lacking = "cannot start:" in result.output and "python -m models.assets fetch" in result.output
    assert result.exit_code == 0 or ("--dry-run" in words and lacking), result.output


@pytest.mark.parametrize(
    ("script", "first", "last"),
    [
        ("quickstart.sh", "From a fresh clone to a tuned solver", "each at its best schedule and guidance.\n"),
        ("run_tests.sh", "Runs the linters and every test", "Makes .venv and installs what it needs.\n"),
    ],
)
def test_a_script_says_what_it_does_and_does_nothing(script: str, first: str, last: str, tmp_path: Path) -> None:
    for file in (script, "scripts/make_environment.sh"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    told = subprocess.run(["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=9)
    assert told.stdout.startswith(first)
    assert told.stdout.endswith(last)
    assert not (tmp_path / ".venv").exists()


def test_an_environment_that_was_left_half_made_is_made_anew(tmp_path: Path) -> None:
    python, own = tmp_path / "bin" / "python3.11", tmp_path / ".venv" / "bin" / "python"
    made = "touch .venv/bin/activate .venv/bin/pip; chmod +x .venv/bin/pip"
    texts = {python: f'if [ "$2" = venv ]; then {made}; fi', own: "test -e .venv/bin/pip"}  # `-m pip` fails without
    for file, text in texts.items():
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).touch()
    code = f"PATH={python.parent}:$PATH; source {REPOSITORY / 'scripts' / 'make_environment.sh'}; make_environment ''"
    told = [subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True) for _ in range(2)]
    assert [shell.returncode for shell in told] == [0, 0], told
    assert [shell.stdout.count("making .venv") for shell in told] == [1, 0]


def test_every_other_command_is_run_by_what_is_named() -> None:
    written = {module for module, _ in written_out()}
    shown = {(module, module in SHORTENED and not OPEN.search(options)) for _, module, options in commands()}
    scripts = re.findall(r"^ {4}bash (\S+)", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    left = {module for module, here in shown if not here} | {name for name in scripts if name != "quickstart.sh"}
    assert left | written >= SHORTENED.keys() | RUN_BY.keys()
    for module in left:
        name = module if module.endswith(".sh") else module.rsplit(".", 1)[-1]
        assert name in (REPOSITORY / RUN_BY[module]).read_text(), module


def test_the_readme_s_python_draws() -> None:
    text = (REPOSITORY / "README.md").read_text()
    start = text.index("    import torch\n")
    code = textwrap.dedent(text[start : text.index("\n\nIn diffusers", start)])
    drawn: dict[str, object] = {}
    exec(code, drawn)
    images = drawn["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (1, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1


def test_the_citation_is_well_formed() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert all(reference["url"].startswith("https://arxiv.org/abs/") for reference in cited["references"])


@pytest.mark.parametrize(
    ("module", "typed", "name"),
    [
        ("sample", "--model", "model_path"),
        ("sample", "--num_steps", "num_steps"),
        ("sample", "--predictor-path", "predictor_path"),
        ("train", "--model", "model_path"),
        ("train", "--num-steps", "num_steps"),
        ("train", "--guidance", "guidance_rate"),
        ("evaluate", "--model_path", "model"),
        ("evaluate", "--reference_steps", "reference_steps"),
    ],
)
def test_an_option_of_one_command_is_typed_alike_in_the_others(module: str, typed: str, name: str) -> None:
    for words in ([typed, "5"], [f"{typed}=5"]):
        assert import_module(module).main.make_context(module, words).params[name] in (5, "5")


def test_commands_that_may_need_no_model_start_without_diffusers() -> None:
    modules = ("sample", "train", "scripts.show_solver", "scripts.export_diffusers")
    loaded = "print({'diffusers', 'transformers', 'scipy'} & sys.modules.keys())"
    code = "import sys\n" + "".join(f"import {module}; print('{module}'); {loaded}\n" for module in modules)
    told = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert told.stdout == "".join(f"{module}\nset()\n" for module in modules)
