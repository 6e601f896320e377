"""The readers of snapshots and of configurations under atheris, which looks for inputs that reach new branches.

    pip install atheris
    python -m tests.coverage_fuzz snapshot corpus/ -max_total_time=1200
    python -m tests.coverage_fuzz config corpus/ -max_total_time=1200

`corpus/` holds inputs to begin with, one a file. Anything but a value or an `InputError` is a find, and so are five
seconds or a gigabyte. What is found becomes a case of tests/test_fuzz.py. Atheris is no dependency of the project.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["training.pickled_predictor", "training.snapshot", "training.solver"]):
    from training.snapshot import load_snapshot
with atheris.instrument_imports(include=["training.runs.configuration", "training.ppo.config", "yaml", "omegaconf"]):
    from training.ppo.config import load_config
import models.pipelines  # noqa: F401  which the readers load when they need it: longer than an input may take
from errors import InputError

READERS = {"snapshot": ("network-snapshot-000001.pkl", load_snapshot), "config": ("config.yaml", load_config)}


def main() -> None:
    """Read what atheris comes up with, without end."""
    name, read = READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name

        def try_one(content: bytes) -> None:
            path.write_bytes(content)
            try:
                read(path)
            except InputError as error:
                if path.name not in str(error):
                    raise

        atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=2500", "-max_len=20000"], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
