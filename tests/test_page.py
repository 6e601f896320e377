"""The slider that lays two images over each other, driven in headless Chromium where one is installed."""

from __future__ import annotations

import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from training.measuring.page import StripRow, page, strip

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NAMES = ("start", "tuned", "reference")


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, format="png")
    return buffer.getvalue()


ROWS = [
    StripRow(
        f"prompt <{row}>",
        f"seed {row}",
        {name: picture(100 * row + 10 * column) for column, name in enumerate(NAMES)},
    )
    for row in range(2)
]


class Elements(HTMLParser):
    """The attributes of every element."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def driven(folder: Path, actions: str) -> Elements:
    """The page in the browser, after a script has acted on it."""
    content = page("test", [strip(ROWS, side=8)]).decode().replace("</body>", f"<script>{actions}</script></body>")
    (folder / "page.html").write_text(content)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", (folder / "page.html").as_uri()]
    return Elements(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def stage(elements: Elements) -> dict[str, dict[str, str | None]]:
    return {values["class"]: values for tag, values in elements.found if values.get("class") in ("under", "over")}


def sources(elements: Elements) -> list[str | None]:
    """Of the strip's own images, row by row."""
    return [values["src"] for tag, values in elements.found if tag == "img" and "class" not in values]


def test_the_page_shows_every_image_without_a_script() -> None:
    elements = Elements(page("test", [strip(ROWS, side=8)]).decode())
    assert len(sources(elements)) == len(ROWS) * len(NAMES) == len(set(sources(elements)))
    assert not stage(elements)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_slider_compares_two_images_of_a_prompt(tmp_path: Path) -> None:
    at_first = driven(tmp_path, "")
    shown, images = stage(at_first), sources(at_first)
    assert (shown["over"]["src"], shown["under"]["src"]) == (images[0], images[1])
    assert "inset(0px 50% 0px 0px)" in shown["over"]["style"]
    actions = """
        const [prompt, left, right] = document.querySelectorAll(".slider select");
        const set = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
        set(prompt, 1); set(left, 2); set(right, 0); set(document.querySelector(".slider input"), 20);
    """
    moved = stage(driven(tmp_path, actions))
    assert (moved["over"]["src"], moved["under"]["src"]) == (images[5], images[3])
    assert (moved["over"]["alt"], moved["under"]["alt"]) == ("reference", "start")
    assert "inset(0px 80% 0px 0px)" in moved["over"]["style"]
