"""Statistics of a folder of real images, for FID, KID and CMMD: `python -m scripts.image_statistics FOLDER`."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from errors import shows_input_errors
from models.devices import resolve_device
from models.inception import RESIZES, Resize
from training.measuring.real_images import (
    DISTANCES,
    RealImages,
    folder_features,
    load_extractors,
    parse_distances,
    real_files,
    say_few_for_fid,
)
from training.runs.command_line import require_one_process

EXAMPLES = """
\b
Examples:
  python -m scripts.image_statistics coco/val2014                     # for FID: 34 MB
  python -m scripts.image_statistics coco/val2014 --distances fid,kid,cmmd --resize legacy --out coco_legacy.npz
"""


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--distances",
    default="fid",
    help=f"What it is to serve, of {', '.join(DISTANCES)}: KID and CMMD keep every image's features.",
)
@click.option(
    "--resize",
    type=click.Choice(RESIZES),
    default="clean",
    help="clean: as clean-fid; legacy: by the network itself, as most published numbers.",
)
@click.option("--out", type=click.Path(path_type=Path), help="The file to write. [FOLDER_RESIZE.npz]")
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Images at once.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@shows_input_errors
def main(folder: Path, distances: str, resize: Resize, out: Path | None, batch: int, device: str) -> None:
    """Write a statistics file of all images in FOLDER: mu and sigma of InceptionV3's features, as other code has it."""
    require_one_process()
    wanted = parse_distances(distances)
    files = real_files(folder)
    extractors = load_extractors(wanted, resize, resolve_device(device))
    with tqdm(total=len(files), unit="image") as bar:
        features = folder_features(folder, extractors, batch, bar.write, bar.update)
    real = RealImages.of(str(folder), features, extractors)
    if "fid" in wanted:
        say_few_for_fid(real.count, click.echo)
    target = out or folder.resolve().with_name(f"{folder.resolve().name}_{resize}.npz")
    real.save(target, wanted)
    click.echo(f"wrote {target}: {real.count} images, {', '.join(wanted)}, {resize} resizing")


if __name__ == "__main__":
    main()
