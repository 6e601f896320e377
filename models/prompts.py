"""Prompts and seeds as people write them down: a text file, a table with a column `text`, a list such as `0-3,7`."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from errors import InputError
from models import asset_table

PROMPT_COLUMN = "text"
MAXIMUM_SEED = 2**63 - 1
MAXIMUM_SEEDS = 1_000_000  # a mistyped range must not fill the memory
SEED_RANGE = re.compile(r"(\d{1,30})(?:-(\d{1,30}))?", re.ASCII)  # Python refuses to read thousands of digits
BYTE_ORDER_MARK = "\ufeff"
WORDLESS = ("P", "Z", "M", "Cc", "Cf")  # Unicode categories: punctuation, blanks, marks, control, format


def text_fault(text: str) -> str | None:
    """Why a text is a prompt for no model at all, or None where it may be one."""
    if not text.strip():
        return "it is empty"
    if "\0" in text:
        return "it holds a NUL character"
    if any(unicodedata.category(character) == "Cs" for character in text):  # how Python keeps what it cannot decode
        return "it holds bytes that are not UTF-8"
    if text.startswith(BYTE_ORDER_MARK):
        return "it begins with a byte order mark, as where files were joined"
    if all(unicodedata.category(character).startswith(WORDLESS) for character in text):
        return "it holds no letter, digit or symbol"
    return None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a `.txt` file (one a line, blank lines skipped), a `.csv` (column `text`) or a `.json` list.

    Raises InputError where the file is missing, unreadable, of another kind or empty, has not one such column, or lacks
    a cell, or a line of it is no prompt (`text_fault`).
    """
    file = Path(path)
    readers = {".txt": _lines, ".csv": _text_column, ".json": _listed}
    if file.suffix.lower() not in readers:
        raise InputError(
            f"{file}: prompts are read from a .txt file (one a line), a .csv file (column `{PROMPT_COLUMN}`) or a "
            ".json list"
        )
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such prompt file{_fetched_by(file)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); save the prompts as UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if "\0" in content:
        raise InputError(f"{file}: holds NUL characters, as UTF-16 does; save the prompts as UTF-8")
    place = "entry" if file.suffix.lower() == ".json" else "line"
    prompts = []
    for line, prompt in readers[file.suffix.lower()](file, content):
        if fault := text_fault(prompt):
            raise InputError(f"{file}, {place} {line}: {fault}; write a prompt or remove it")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{file}: holds no prompt; write at least one")
    return prompts


def _fetched_by(file: Path) -> str:
    """The command that fetches a file, where one does."""
    for name, bundle in asset_table.BUNDLES.items():
        if any(file.resolve() == (asset_table.ROOT / asset.path).resolve() for asset in bundle.files):
            return f". Fetch it:  python -m models.assets fetch {name}"
    return ""


def parse_seeds(text: str) -> list[int]:
    """Seeds out of a list of numbers and ranges, both ends included: `0-3,7` is [0, 1, 2, 3, 7].

    Raises InputError for anything else, for a range that runs backwards, for a seed given twice or above 2^63 - 1.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = SEED_RANGE.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"seeds {text!r}: {part.strip()!r} is neither a number nor a range; write for example 0-3,7"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"seeds {text!r}: the range {part.strip()!r} runs backwards; write {last}-{first}")
        if last > MAXIMUM_SEED:
            raise InputError(f"seeds {text!r}: {last} is above the largest seed, {MAXIMUM_SEED}")
        if len(seeds) + last - first + 1 > MAXIMUM_SEEDS:
            raise InputError(f"seeds {text!r}: more than {MAXIMUM_SEEDS} seeds in one list")
        seeds.extend(range(first, last + 1))
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if len(set(seeds)) < len(seeds) else []
    if twice:
        raise InputError(f"seeds {text!r}: seed {twice[0]} is given twice")
    return seeds


def _lines(_: Path, content: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(io.StringIO(content, newline=None), start=1):
        if line.strip():
            yield number, line.strip()


def _listed(file: Path, content: str) -> Iterator[tuple[int, str]]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: no JSON ({error}); write a list of prompts") from None
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise InputError(f"{file}: is no list of texts; write a list of prompts")
    yield from ((number, prompt.strip()) for number, prompt in enumerate(found, start=1))


def _text_column(file: Path, content: str) -> Iterator[tuple[int, str]]:
    if content.startswith(BYTE_ORDER_MARK):  # a second one: the header's name would look right and be another
        raise InputError(f"{file}, line 1: {text_fault(content)}; save the prompts as plain UTF-8")
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        if PROMPT_COLUMN not in columns:
            found = ", ".join(columns) or "none"
            raise InputError(
                f"{file}: has no column `{PROMPT_COLUMN}` (columns found: {found}); name the prompts' column so"
            )
        if (number := columns.count(PROMPT_COLUMN)) > 1:
            raise InputError(f"{file}: has {number} columns `{PROMPT_COLUMN}`; leave one of them")
        for row in reader:
            yield reader.line_num, _cell(file, reader.line_num, row)
    except csv.Error as error:
        raise InputError(
            f"{file}, near line {reader.line_num}: not a table ({error}); quote prompts that hold quotes"
        ) from None


def _cell(file: Path, line: int, row: dict[str | None, str | list[str] | None]) -> str:
    if None in row:
        raise InputError(f"{file}, line {line}: more fields than the header has; quote prompts that hold commas")
    prompt = row[PROMPT_COLUMN]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{file}, line {line}: column `{PROMPT_COLUMN}` is empty; write a prompt or remove the line")
    return prompt.strip()


def first_prompts(file: Path, number: int, *, repeated: bool = False) -> list[str]:
    """The first `number` different prompts of a file, or `repeated` as they stand. Raises InputError for fewer."""
    lines = read_prompts(file)
    prompts = lines if repeated else list(dict.fromkeys(lines))
    if len(prompts) < number:
        kind = "" if repeated else "different "
        raise InputError(f"{file}: has {len(prompts)} {kind}prompts, --number {number} asks for more")
    return prompts[:number]
