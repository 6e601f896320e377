"""Fetch the weights of the preference reward HPS v2."""

from __future__ import annotations

if __name__ == "__main__":
    from interrupts import end_at_once_on_signals

    end_at_once_on_signals()

from pathlib import Path

import click

from errors import shows_input_errors
from models import asset_table
from models.asset_table import HPS, TOKENIZER
from models.assets import fetch

EXAMPLE = "Example:  python download_hpsv2_weights.py --version v2.1"


@click.command(epilog=EXAMPLE, context_settings={"show_default": True})
@click.option("--version", type=click.Choice(list(HPS)), default="v2.1", help="Of the score.")
@click.option("--output-dir", type=click.Path(file_okay=False, path_type=Path), help="[default: weights/]")
@shows_input_errors
def main(version: str, output_dir: Path | None) -> None:
    """Fetch the checkpoint (about 2 GB; Apache 2.0) and, to its own place, the tokenizer that it needs.

    A whole file is not fetched twice; a download that broke off goes on. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
    honoured.
    """
    weights = HPS[version]
    folder = output_dir or (asset_table.ROOT / weights.path).parent
    fetch(weights, folder / weights.name, click.echo)
    for asset in TOKENIZER:
        fetch(asset, asset_table.ROOT / asset.path, click.echo)


if __name__ == "__main__":
    main()
