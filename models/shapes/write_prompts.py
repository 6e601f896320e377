"""Write the prompt files of the shapes world: `python -m models.shapes.write_prompts`.

One file for each split, `src/prompts/shapes_<split>.csv`, with the columns `text` and `objects` (their number); one
object to seven in turn, so that the first n lines of a file are as mixed as all of it. One more for each number up to
three, of held-out captions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import click

from errors import shows_input_errors
from models.shapes import scenes

HELD_OUT_BY_NUMBER = 125
NUMBERS_APART = (1, 2, 3)  # of objects
NUMBERS = {"train": 2400, "validation": 300, "heldout": 600}


def write(file: Path, captions: Iterable[str]) -> None:
    """Write one prompt file."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["text", "objects"])
        writer.writerows([caption, scenes.parse(caption).number_of_objects] for caption in captions)
    click.echo(f"wrote {file}")


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), default=Path("src/prompts"), show_default=True
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@shows_input_errors
def main(output: Path, seed: int) -> None:
    """Write the captions of the three splits."""
    output.mkdir(parents=True, exist_ok=True)
    for split in scenes.SPLITS:
        write(output / f"shapes_{split}.csv", scenes.captions(split, NUMBERS[split], seed))
    for number in NUMBERS_APART:
        captions = scenes.captions("heldout", HELD_OUT_BY_NUMBER, seed, (number,))
        write(output / f"shapes_heldout_{number}.csv", captions)


if __name__ == "__main__":
    main()
