"""Write the prompt files of the shapes world: `python -m models.shapes.write_prompts`.

One file for each split, `src/prompts/shapes_<split>.csv`, with the columns `text` and `objects` (their number); one,
two and three objects in turn, so that the first n lines of a file are as mixed as all of it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click

from models.shapes import scenes

NUMBERS = {"train": 2400, "validation": 300, "heldout": 600}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("src/prompts"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(output: Path, seed: int) -> None:
    """Write the captions of the three splits."""
    output.mkdir(parents=True, exist_ok=True)
    for split in scenes.SPLITS:
        file = output / f"shapes_{split}.csv"
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["text", "objects"])
            for caption in scenes.captions(split, NUMBERS[split], seed):
                writer.writerow([caption, len(scenes.parse(caption).objects)])
        click.echo(f"wrote {file}")


if __name__ == "__main__":
    main()
