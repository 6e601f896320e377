"""An evaluation as one self-contained HTML page: verdict, table, plots, images side by side, and how to repeat it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from PIL import Image

from training.measuring.comparison import Difference, Entry, Row
from training.measuring.evaluation import metric_of
from training.measuring.report import Report, setting_of

Pictures = Callable[[Entry, Sequence[int]], np.ndarray]
"""Images uint8 [n, H, W, 3] of an entry, of the prompts with these numbers."""

EXTREMES = 4  # prompts that are shown on each side of a paired difference
LOSSLESS = 128  # pixels: larger images are packed as WebP at quality 90

STYLE = """
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 72rem; color: #1f2933; background: #fff;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: 1rem; border-top: 1px solid #e4e7eb; }
.muted { color: #5f6c7b; } .scroll { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e4e7eb; text-align: left; vertical-align: top; }
th.sorts { cursor: pointer; color: #2563a8; }
.better { color: #1a7f37; } .worse { color: #b42318; }
.slider { position: relative; width: 20rem; height: 20rem; } .slider img { position: absolute; inset: 0; width: 100%;
          height: 100%; object-fit: contain; } .pairs img { width: 9rem; height: 9rem; object-fit: contain; }
.pixelated img { image-rendering: pixelated; }
pre { font-size: .82rem; background: #f7f8fa; padding: 1rem; overflow-x: auto; white-space: pre-wrap; }
"""

SCRIPT = """
document.querySelectorAll("th.sorts").forEach(head => head.onclick = () => {
  const table = head.closest("table"), column = [...head.parentNode.children].indexOf(head);
  const value = row => { const cell = row.children[column], told = cell.dataset.value;
                         return told === undefined ? cell.textContent : +told; };
  const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  [...table.tBodies[0].rows].sort((a, b) => (value(a) > value(b) ? 1 : -1) * (up === "1" ? 1 : -1))
    .forEach(row => table.tBodies[0].append(row));
});
const shown = JSON.parse(document.getElementById("images").textContent), pick = id => document.getElementById(id);
function show() {
  const prompt = +pick("prompt").value;
  pick("left").src = shown[pick("one").value][prompt]; pick("right").src = shown[pick("other").value][prompt];
  pick("right").style.clipPath = `inset(0 0 0 ${pick("edge").value}%)`;
}
if (pick("edge")) { ["one", "other", "prompt", "edge"].forEach(id => pick(id).oninput = show); show(); }
"""


def page(report: Report, pictures: Pictures, origin: str) -> bytes:
    """The page of a report; `origin` says what code made it."""
    sections = [
        "<h1>Solvers side by side</h1>",
        f"<p>{'<br>'.join(verdicts(report))}</p>",
        f"<h2>Table</h2>{_table(report)}",
        f'<h2>Against parallel and total evaluations</h2><img alt="metrics" src="{_data(report.figure(), "png")}">',
        _slider(report),
        _extremes(report, pictures),
        f"<h2>To repeat it</h2><pre>{escape(origin)}\n"
        + "\n".join(f"{escape(name)}: {escape(str(value))}" for name, value in report.settings.items())
        + "</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Solvers side by side</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    ).encode()


def verdicts(report: Report) -> list[str]:
    """What can be told of the reward against the first baseline, a sentence for each solver that is one of ours.

    Of all solvers where none is: classical ones against each other.
    """
    first = report.differences[0].baseline if report.differences else None
    found = [item for item in report.differences if item.baseline == first and item.metric == "reward"]
    ours = [item for item in found if item.row.sampler == "epd"] or found
    return [_sentence(item) for item in ours] or ["One solver alone: there is nothing to compare it with."]


def _sentence(item: Difference) -> str:
    interval, baseline = item.interval, item.baseline_entry.solver
    word = {"better": "is better than", "worse": "is worse than", "open": "cannot be told from"}[item.verdict]
    return (
        f"<b>{escape(item.row.label)}</b> with {item.row.parallel} parallel evaluations ({item.row.total} in all) "
        f'<b class="{item.verdict}">{word}</b> {escape(baseline.label)} with {baseline.evaluations.parallel} '
        f"({baseline.evaluations.total} in all): {interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}] "
        "in reward."
    )


def _table(report: Report) -> str:
    metrics = report.comparison.metrics
    headings = ["solver", "parallel NFE", "total NFE", *(metric_of(name).heading for name in metrics)]
    head = "".join(f'<th class="sorts">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{_line(report, row)}</tr>" for row in report.comparison.rows)
    published = "".join(f"<p class=muted>{escape(line)}</p>" for line in report.published_lines())
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{published}'


def _line(report: Report, row: Row) -> str:
    cells = [f"<td>{escape(row.label)}</td>"]
    cells += [f'<td data-value="{count}">{count}</td>' for count in (row.parallel, row.total)]
    for metric in report.comparison.metrics:
        cell, beside = row.cells[metric], escape(report.beside(row, metric))
        low, high = cell.interval.low, cell.interval.high
        cells.append(
            f'<td data-value="{cell.interval.estimate!r}">{cell.interval.estimate:.4g}{beside}<br>'
            f'<span class="muted">[{low:.4g}, {high:.4g}] {escape(setting_of(cell.entry))}</span></td>'
        )
    return "".join(cells)


def _slider(report: Report) -> str:
    """The first prompts' images of any two solvers, one over the other, with a movable edge."""
    entries = {f"{row.label}, {row.parallel} evaluations": row.cells["reward"].entry for row in report.comparison.rows}
    if report.reference is not None:
        entries[report.reference.solver.label] = report.reference
    images = {name: [_packed(image) for image in entry.measured.previews.numpy()] for name, entry in entries.items()}
    if not all(images.values()):
        return '<script type="application/json" id="images">{}</script>'

    def choice(name: str, texts: Sequence[str], values: Sequence[object], chosen: int = 0) -> str:
        options = "".join(
            f'<option value="{escape(str(value))}"{" selected" if at == chosen else ""}>{escape(text)}</option>'
            for at, (text, value) in enumerate(zip(texts, values, strict=True))
        )
        return f'<select id="{name}">{options}</select> '

    names, prompts = list(images), report.prompts[: len(next(iter(images.values())))]
    kept = json.dumps(images).replace("</", "<\\/")
    return (
        "<h2>Side by side</h2><p>"
        + choice("one", names, names)
        + choice("other", names, names, len(names) - 1)
        + choice("prompt", [prompt or f"image {at}" for at, prompt in enumerate(prompts)], range(len(prompts)))
        + '</p><div class="slider pixelated"><img id="left" alt="left"><img id="right" alt="right"></div>'
        f'<input id="edge" type="range" min="0" max="100" value="50" style="width:20rem">'
        f'<script type="application/json" id="images">{kept}</script>'
    )


def _extremes(report: Report, pictures: Pictures) -> str:
    """Prompts that a solver gains and loses most on against the first baseline, with both images."""
    found = [item for item in report.differences if item.metric == "reward"]
    ours = [item for item in found if item.row.sampler == "epd"] or found
    if not ours:
        return ""
    item = ours[0]
    mine, theirs = item.row.cells["reward"].entry, item.baseline_entry
    gains = mine.measured.values["reward"] - theirs.measured.values["reward"]
    order = gains.argsort(descending=True).tolist()
    count = min(EXTREMES, len(order) // 2)
    rows = [*order[:count], *order[len(order) - count :]]
    columns = [pictures(entry, rows) for entry in (mine, theirs)]
    body = "".join(
        f"<tr><td>{gains[number].item():+.3g}</td><td>{_img(columns[0][at])}</td><td>{_img(columns[1][at])}</td>"
        f"<td>{escape(report.prompts[number])}</td></tr>"
        for at, number in enumerate(rows)
    )
    names = (f"{entry.solver.label}, {entry.solver.evaluations.parallel} evaluations" for entry in (mine, theirs))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        "<h2>Where it gains and loses most</h2><p class=muted>Prompts by the paired difference in reward, the best "
        f'and the worst {count}.</p><table class="pairs pixelated"><tr><th>difference</th>{head}<th>prompt</th></tr>'
        f"{body}</table>"
    )


def _img(image: np.ndarray) -> str:
    return f'<img alt="" src="{_packed(image)}">'


def _packed(image: np.ndarray) -> str:
    """An image uint8 [H, W, 3] as a data URL."""
    buffer = io.BytesIO()
    kind = "png" if max(image.shape[:2]) <= LOSSLESS else "webp"
    Image.fromarray(image).save(buffer, format=kind, **({"quality": 90} if kind == "webp" else {}))
    return _data(buffer.getvalue(), kind)


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
