"""README and docs: short enough, their links lead somewhere, their Python runs, their commands are commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / name for name in ("README.md", "guide2.md", "docs/commands.md", "docs/promises.md", "docs/results.md")
]
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")
COMMAND = re.compile(r"^ {4}python (?:-m (?P<module>[\w.]+)|(?P<script>\w+)\.py)(?P<options>[^\n]*)", re.MULTILINE)
NO_CLICK = ("pytest", "training.ppo.tests")  # they have commands of another kind
# Where a page shows it, an output or a comment begins.
COMMENT = re.compile(r"\s{2,}#|\s+# ")


def test_the_readme_is_for_newcomers() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def commands() -> list[tuple[str, str, str]]:
    """(page, module, its options) of every command that a page shows."""
    found = []
    for page in PAGES:
        for match in COMMAND.finditer(page.read_text()):
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
