"""An evaluation as one self-contained HTML page: verdict, table, plots, images side by side, and how to repeat it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from training.measuring.comparison import Difference, Entry, Row
from training.measuring.metrics import metric_of
from training.measuring.page import LARGEST_ENLARGED, StripRow, data_url, folded, page, strip, verdict, wide
from training.measuring.report import Report, setting_of

Pictures = Callable[[Entry, Sequence[int]], np.ndarray]
"""Images uint8 [n, H, W, 3] of an entry, of the prompts with these numbers."""

TITLE = "Solvers side by side"
KEY = (
    "Below each number: its 95% interval, and the schedule and guidance (g; * where each evaluation has its own) at "
    "which it stands, for a classical solver the best of those tried."
)
EXTREMES = 4  # prompts that are shown on each side of a paired difference


def evaluation_page(report: Report, pictures: Pictures, machine: str) -> bytes:
    """The page of a report; `machine` says what it was made on."""
    settings = "\n".join([*(f"{name}: {value}" for name, value in report.settings.items()), machine])
    return page(
        TITLE,
        [
            f"<h1>{TITLE}</h1>",
            _verdict(report),
            f"<h2>Table</h2>{_table(report)}",
            "<h2>Every metric of every solver</h2>"
            + wide(f'<img alt="metrics" src="{data_url("image/png", report.figure())}">'),
            _extremes(report, pictures),
            _side_by_side(report),
            f"<h2>To repeat it</h2><pre>{escape(settings)}</pre>",
        ],
    )


def _verdict(report: Report) -> str:
    """What can be told of the reward against the first baseline, a sentence for each solver that is one of ours.

    Of all solvers where none is: classical ones against each other.
    """
    found = _differences(report)
    if not found:
        return verdict("open", "One solver alone: there is nothing to compare it with.", [])
    headline, *others = map(_sentence, found)
    return verdict(found[0].verdict, headline, others)


def _differences(report: Report) -> list[Difference]:
    """In reward, to the first baseline."""
    first = report.differences[0].baseline if report.differences else None
    found = [item for item in report.differences if item.baseline == first and item.metric == "reward"]
    return [item for item in found if item.row.sampler == "epd"] or found


def _sentence(item: Difference) -> str:
    interval, baseline = item.interval, item.baseline_entry.solver
    word = {"better": "is better than", "worse": "is worse than", "open": "cannot be told from"}[item.verdict]
    return (
        f"{item.row.label} with {item.row.parallel} parallel evaluations ({item.row.total} in all) {word} "
        f"{baseline.label} with {baseline.evaluations.parallel} ({baseline.evaluations.total} in all): "
        f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}] in reward."
    )


def _table(report: Report) -> str:
    metrics = report.comparison.metrics
    headings = ["solver", "parallel NFE", "total NFE", *(metric_of(name).heading for name in metrics)]
    head = "".join(f'<th class="sorts">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{_line(report, row)}</tr>" for row in report.comparison.rows)
    published = "".join(f"<p class=muted>{escape(line)}</p>" for line in report.published_lines())
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"{table}<p class=muted>{KEY}</p>{published}"


def _line(report: Report, row: Row) -> str:
    cells = [f"<td>{escape(row.label)}</td>"]
    cells += [f'<td data-value="{count}">{count}</td>' for count in (row.parallel, row.total)]
    for metric in report.comparison.metrics:
        cell, beside = row.cells[metric], escape(report.beside(row, metric))
        low, high = cell.interval.low, cell.interval.high
        cells.append(
            f'<td data-value="{cell.interval.estimate!r}">{cell.interval.estimate:.4g}{beside}<br>'
            f'<span class="muted note">[{low:.4g}, {high:.4g}]<br>{escape(setting_of(cell.entry))}</span></td>'
        )
    return "".join(cells)


def _extremes(report: Report, pictures: Pictures) -> str:
    """Prompts that a solver gains and loses most on against the first baseline, with both images."""
    found = _differences(report)
    if not found:
        return ""
    mine, theirs = found[0].row.cells["reward"].entry, found[0].baseline_entry
    gains = mine.measured.values["reward"] - theirs.measured.values["reward"]
    order = gains.argsort(descending=True).tolist()
    count = min(EXTREMES, len(order) // 2)
    numbers = [*order[:count], *order[len(order) - count :]]
    drawn = {_named(entry): pictures(entry, numbers) for entry in (mine, theirs)}
    rows = [
        StripRow(
            _prompt(report, number),
            f"{gains[number].item():+.3g}",
            {name: _packed(images[at]) for name, images in drawn.items()},
        )
        for at, number in enumerate(numbers)
    ]
    return (
        "<h2>Where it gains and loses most</h2><p class=muted>Prompts by the paired difference in reward, the best "
        f"and the worst {count}.</p>{_strip(rows, drawn.values())}"
    )


def _side_by_side(report: Report) -> str:
    """The first prompts' images by every solver at its best by reward."""
    entries = [row.cells["reward"].entry for row in report.comparison.rows]
    entries += [] if report.reference is None else [report.reference]
    drawn = {_named(entry): entry.measured.previews.numpy() for entry in entries}
    count = len(entries[0].measured.previews)
    if count == 0:
        return ""
    rows = [
        StripRow(_prompt(report, number), "", {name: _packed(images[number]) for name, images in drawn.items()})
        for number in range(count)
    ]
    return folded("The first prompts by every solver", [_strip(rows, drawn.values())])


def _strip(rows: Sequence[StripRow], drawn: Iterable[np.ndarray]) -> str:
    return strip(rows, side=max(side for images in drawn for side in images.shape[1:3]))


def _named(entry: Entry) -> str:
    return f"{entry.solver.label}, {entry.solver.evaluations.parallel} evaluations"


def _prompt(report: Report, number: int) -> str:
    """The prompt; the number of an image without one."""
    return report.prompts[number] or f"image {number}"


def _packed(image: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as the content of a file: whole where it is small, at a good quality otherwise."""
    buffer = io.BytesIO()
    small = max(image.shape[:2]) <= LARGEST_ENLARGED
    Image.fromarray(image).save(buffer, **({"format": "png"} if small else {"format": "webp", "quality": 90}))
    return buffer.getvalue()
