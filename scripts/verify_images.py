"""Say how many images of a folder show what their prompts say: the exact verifier of the shapes world on a folder of
sample.py.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from errors import InputError, shows_input_errors
from models.pictures import opened_picture
from models.shapes.scenes import IMAGE_SIZE, parse, to_tensor
from models.shapes.verify import Verdict, verify
from training.image_folder import LOG_NAME
from training.measuring.statistics import bootstrap_indices, mean_interval

EXAMPLES = """
\b
Example:
  python sample.py --model_path shapes --prompt-file src/prompts/shapes_heldout_1.csv --outdir outputs/one
      --solver ddim --num-steps 51
  python -m scripts.verify_images outputs/one
"""


def read_records(folder: Path) -> list[tuple[Path, str]]:
    """Image file and prompt of every line of a folder's images.jsonl.

    Raises:
        InputError: there is no such file, or a line of it is not one of sample.py's.
    """
    log = folder / LOG_NAME
    if not log.is_file():
        raise InputError(f"{log} is missing: give a folder that sample.py wrote")
    records = []
    try:
        with log.open(encoding="utf-8") as file:
            lines = list(file)  # not splitlines, for which prompts may hold ends of lines
    except OSError as error:
        raise InputError(f"{log}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{log}: no text in UTF-8 ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            file, prompt = record["file"], record["prompt"]
            if not (isinstance(file, str) and isinstance(prompt, str)):
                raise TypeError("file and prompt are texts")
            records.append((folder / file, prompt))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{log}, line {number}: no record of an image ({error})") from None
    if not records:
        raise InputError(f"{log} is empty: sample.py wrote no image")
    return records


def verify_file(file: Path, prompt: str) -> Verdict:
    """The verdict on one image file.

    Raises:
        InputError: the file is missing, no image or of another size, or the prompt is no caption of this world.
    """
    with opened_picture(file) as image:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"it has {image.width} x {image.height} pixels, not {IMAGE_SIZE} x {IMAGE_SIZE}")
        pixels = np.array(image.convert("RGB"))
    return verify(to_tensor(pixels), prompt)


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@shows_input_errors
def main(folder: Path) -> None:
    """Verify every image that sample.py wrote into FOLDER against its prompt.

    Prints, for each number of objects, the share of images whose whole caption holds, the mean share of its parts, both
    with 95% bootstrap intervals over prompts, and the parts that fail most.
    """
    verdicts: dict[int, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for file, prompt in tqdm(read_records(folder), unit="image"):
        verdicts[parse(prompt).number_of_objects][prompt].append(verify_file(file, prompt))
    for number, by_prompt in sorted(verdicts.items()):
        for line in summary(number, by_prompt):
            click.echo(line)


def summary(number_of_objects: int, by_prompt: dict[str, list[Verdict]]) -> list[str]:
    """Lines about the images of one number of objects, their verdicts grouped by prompt."""
    every = [verdict for group in by_prompt.values() for verdict in group]
    correct = torch.tensor([np.mean([verdict.correct for verdict in group]) for group in by_prompt.values()])
    score = torch.tensor([np.mean([verdict.score for verdict in group]) for group in by_prompt.values()])
    failures = Counter(part for verdict in every for part, holds in verdict.parts.items() if not holds)
    worst = ", ".join(f"{part} {count}" for part, count in failures.most_common(4)) or "none"
    objects = "object" if number_of_objects == 1 else "objects"
    return [
        f"{number_of_objects} {objects}: {len(every)} images of {len(by_prompt)} prompts",
        f"  whole caption holds  {_with_interval(correct)}",
        f"  parts that hold      {_with_interval(score)}",
        f"  failures             {worst}",
    ]


def _with_interval(values: torch.Tensor) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}"
    indices = bootstrap_indices(len(values), torch.Generator().manual_seed(0))
    estimate, low, high = mean_interval(values.double(), indices)
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
