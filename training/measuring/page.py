"""Pages that people look at: one HTML file with everything in it, that opens anywhere and asks no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

LARGEST_ENLARGED = 128  # pixels
WIDE = 6.0  # inches: plots from this width on are `wide`

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #5f6c7b; --line: #e4e7eb; --accent: #2563a8; --good: #1f7a4d;
        --warn: #b42318; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.5rem 4rem; max-width: 68rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
.muted, figcaption, th { color: var(--muted); }
.verdict { border-left: 5px solid var(--muted); padding: .2rem 0 .1rem 1rem; margin: 1.2rem 0;
           overflow-wrap: anywhere; }
.verdict b { display: block; font-size: 1.35rem; line-height: 1.3; margin-bottom: .4rem; }
.verdict p { margin: 0 0 .3rem; }
.verdict.better { border-color: var(--good); }
.verdict.better b { color: var(--good); }
.verdict.worse { border-color: var(--warn); }
.verdict.worse b { color: var(--warn); }
.warn { color: var(--warn); font-weight: 600; }
figure { margin: 0 0 .8rem; }
figcaption { font-size: .82rem; line-height: 1.4; margin-top: .25rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
.wide img { min-width: 34rem; max-width: max(34rem, 100%); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)); gap: 1.4rem 1.2rem; }
.row { margin: 0 0 1.2rem; }
.row p { margin: 0 0 .3rem; }
.note { white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(0, min(14rem, 46%))); gap: .7rem; }
.pictures figure { margin: 0; }
.pictures img, .stage img { width: 100%; border-radius: 4px; }
.pixels img { image-rendering: pixelated; }
.slider { max-width: 24rem; margin: 1.6rem 0; }
.stage { position: relative; }
.stage .over { position: absolute; inset: 0; height: 100%; }
.slider input { width: 100%; margin: .5rem 0; }
.slider label { display: inline-block; margin: 0 .8rem .3rem 0; font-size: .85rem; color: var(--muted); }
.slider select { font: inherit; max-width: 14rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
.bar { height: .7rem; background: var(--accent); border-radius: 2px; min-width: 1px; }
pre { font-size: .82rem; line-height: 1.45; background: #f7f8fa; border-radius: 8px; padding: .8rem 1rem; margin: 0;
      overflow-x: auto; }
.command { display: flex; gap: .5rem; align-items: flex-start; margin: .2rem 0 .9rem; }
.command pre { flex: 1; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
button { font: inherit; font-size: .85rem; padding: .5rem .8rem; border: 1px solid var(--line); border-radius: 8px;
         background: #fff; cursor: pointer; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; padding: 1rem 0 .6rem; margin-top: 2.4rem;
          border-top: 1px solid var(--line); }
.scroll { overflow-x: auto; }
th.sorts { cursor: pointer; color: var(--accent); }
"""

# Without it the page shows all that it shows: the slider takes its images from the strip.
SCRIPT = """
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre");
    getSelection().selectAllChildren(text);
    try { await navigator.clipboard.writeText(text.textContent); } catch { document.execCommand("copy"); }
    button.textContent = "copied";
  });
}
for (const head of document.querySelectorAll("th.sorts")) {
  head.addEventListener("click", () => {
    const column = [...head.parentNode.children].indexOf(head), body = head.closest("table").tBodies[0];
    const told = row => row.children[column].dataset.value;
    const value = row => told(row) === undefined ? row.children[column].textContent : +told(row);
    const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
    [...body.rows].sort((a, b) => ((value(a) > value(b)) - (value(a) < value(b))) * (up === "1" ? 1 : -1))
      .forEach(row => body.append(row));
  });
}
for (const strip of document.querySelectorAll(".strip")) {
  const rows = [...strip.querySelectorAll(".row")];
  const names = [...rows[0].querySelectorAll("figcaption")].map(caption => caption.textContent);
  if (names.length < 2) continue;
  const slider = document.createElement("div");
  slider.className = "slider";
  const told = slider.appendChild(document.createElement("p"));
  told.textContent = "Two of them over each other: move the handle to uncover the left one or the right one.";
  const stage = slider.appendChild(document.createElement("div"));
  stage.className = "stage";
  const images = ["under", "over"].map(name => {
    const image = stage.appendChild(new Image());
    image.className = name;
    return image;
  });
  const range = slider.appendChild(Object.assign(document.createElement("input"), {type: "range", value: 50}));
  range.setAttribute("aria-label", "how much of the left image is shown, in percent");
  const choice = (label, options, chosen) => {
    const select = document.createElement("select");
    options.forEach((text, index) => select.add(new Option(text, index, false, index === chosen)));
    const shown = slider.appendChild(document.createElement("label"));
    shown.append(label + " ", select);
    select.addEventListener("input", show);
    return select;
  };
  const prompt = choice("prompt", rows.map(row => row.querySelector("p").firstChild.textContent), 0);
  const left = choice("left", names, 0), right = choice("right", names, 1);
  function show() {
    const drawn = rows[prompt.value].querySelectorAll("img");
    [[images[0], right], [images[1], left]].forEach(([image, side]) => {
      image.src = drawn[side.value].src;
      image.alt = names[side.value];
    });
    images[1].style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
  }
  range.addEventListener("input", show);
  strip.append(slider);
  show();
}
"""


class StripRow(NamedTuple):
    """One prompt: its text, a note beside it, and images by what drew them, the same names in every row.

    Images are the contents of files, PNG or WebP.
    """

    prompt: str
    note: str
    pictures: Mapping[str, bytes]


def page(title: str, sections: Sequence[str]) -> bytes:
    """A whole page of sections of HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    ).encode()


def verdict(kind: str, headline: str, sentences: Sequence[str]) -> str:
    """What came out, in words; `kind` is better, worse or open."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="verdict {kind}"><b>{escape(headline)}</b>{said}</div>'


def strip(rows: Sequence[StripRow], *, side: int) -> str:
    """Images side by side, whole, a row for each prompt, and a slider that lays two of them over each other.

    side: of an image in pixels; small ones are enlarged as they are, pixel by pixel.
    """
    body = "".join(
        f'<div class="row"><p>{escape(row.prompt)} <span class="muted note">{escape(row.note)}</span></p>'
        f'<div class="pictures">{"".join(_picture(row, name) for name in row.pictures)}</div></div>'
        for row in rows
    )
    return f'<div class="strip{" pixels" if side <= LARGEST_ENLARGED else ""}">{body}</div>'


def _picture(row: StripRow, name: str) -> str:
    content = row.pictures[name]
    kind = "image/webp" if content[8:12] == b"WEBP" else "image/png"
    image = f'<img alt="{escape(f"{row.prompt}, {name}")}" src="{data_url(kind, content)}">'
    return f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>"


def commands(wanted: Mapping[str, str]) -> str:
    """Commands to be copied, each below what it is for."""
    return "".join(
        f'<p>{escape(what)}</p><div class="command"><pre>{escape(command)}</pre>'
        f'<button class="copy" type="button">copy</button></div>'
        for what, command in wanted.items()
    )


def folded(title: str, sections: Sequence[str]) -> str:
    """Sections that are shown when their title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{''.join(sections)}</details>"


def figure(drawn: Figure, caption: str) -> str:
    """A plot with what it says."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    source = data_url("image/svg+xml", buffer.getvalue())
    image = f'<img alt="{escape(caption)}" src="{source}">'
    shown = wide(image) if drawn.get_figwidth() >= WIDE else image
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def wide(image: str) -> str:
    """An image that is scrolled on a narrow page, rather than made too small to be read."""
    return f'<div class="wide">{image}</div>'


def data_url(kind: str, content: bytes) -> str:
    """The content of a file of that kind, as the address that it has inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
