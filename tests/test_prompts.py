"""Prompt files and seed lists: what is read back, and which line refuses what is malformed."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from models.prompts import MAXIMUM_SEED, parse_seeds, read_prompts


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("5", [5]),
        (" 2 , 0-1 ", [2, 0, 1]),
        ("4-4", [4]),
        (str(MAXIMUM_SEED), [MAXIMUM_SEED]),
    ],
)
def test_seed_lists_mean_what_they_say(text, seeds):
    assert parse_seeds(text) == seeds


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=5))
def test_seed_lists_agree_with_the_union_of_their_ranges(spans):
    expected = [seed for first, length in spans for seed in range(first, first + length + 1)]
    text = ",".join(f"{first}-{first + length}" for first, length in spans)
    if len(set(expected)) == len(expected):
        assert parse_seeds(text) == expected
    else:
        with pytest.raises(InputError, match="given twice"):
            parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "''"),
        ("0-3,", "''"),
        ("a", "'a'"),
        ("-1", "'-1'"),
        ("1.5", r"'1\.5'"),
        ("0--3", "'0--3'"),
        ("0-3-5", "'0-3-5'"),
        ("٣", "neither a number nor a range"),
        ("7-3", "runs backwards; write 3-7"),
        ("0-3,2", "seed 2 is given twice"),
        (str(MAXIMUM_SEED + 1), "above the largest seed"),
        ("0-99999999999", "more than 1000000 seeds"),
    ],
)
def test_malformed_seed_lists_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_seeds(text)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle, small\r\n\r\n  a blue ring  \n".encode())
    assert read_prompts(file) == ["a red circle, small", "a blue ring"]


def test_a_json_list_is_its_texts(tmp_path):
    (tmp_path / "prompts.json").write_text('["a ring ", "two stars\\nbelow"]')
    assert read_prompts(tmp_path / "prompts.json") == ["a ring", "two stars\nbelow"]


@given(prompts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), min_size=1))
def test_a_table_gives_back_what_was_written(tmp_path_factory, prompts):
    prompts = [f"x{prompt}x" for prompt in prompts]  # no outer blanks, which are stripped
    file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(prompts))
    assert read_prompts(file) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\n  \n", "holds no prompt"),
        ("a.csv", b"", "no column `text` .columns found: none"),
        ("a.csv", b"text\n", "holds no prompt"),
        ("a.csv", b"caption,id\na red circle,1\n", "columns found: caption, id"),
        ("a.csv", b'text\na red circle\n""\n', "line 3: column `text` is empty"),
        ("a.csv", b"id,text\n1\n", "line 2: column `text` is empty"),
        ("a.csv", b"text\na red circle, small\n", "line 2: more fields than the header"),
        ("a.csv", b'text\n"a red circle\n', "near line 1: not a table"),
        ("a.yaml", b"[]", r"\.txt file .*, a \.csv file .* or a \.json list"),
        ("a.json", b"[]", "holds no prompt"),
        ("a.json", b"[", "no JSON"),
        ("a.json", b'{"text": "a ring"}', "is no list of texts"),
        ("a.json", b'["a ring", 3]', "is no list of texts"),
        ("a.json", b'["a ring", " "]', "entry 2: it is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"a red circle\n\xed\xb0\x80\n", "not UTF-8"),  # half of a surrogate pair, as UTF-8 would write it
        ("a.txt", "a red circle".encode("utf-16"), "not UTF-8"),
        (
            "a.txt",
            "a red circle\n".encode("utf-16-le"),
            "holds NUL characters, as UTF-16 does; save the prompts as UTF-8",
        ),
        ("a.csv", "text\na red circle\n".encode("utf-16-be"), "holds NUL characters"),
        ("a.csv", b"text\na red\0 circle\n", "holds NUL characters"),
        ("a.csv", b"\xef\xbb\xbf\xef\xbb\xbftext\na red circle\n", "line 1: it begins with a byte order mark"),
        ("a.txt", b"a ring\n\n\xef\xbb\xbfa red circle\n", "line 3: it begins with a byte order mark"),
        ("a.txt", b"a ring\n ... \n", "line 2: it holds no letter, digit or symbol"),
        ("a.csv", "id,text\n1,\u200b\n".encode(), "line 2: it holds no letter, digit or symbol"),
        ("a.csv", b"text,id,text\na ring,1,a star\n", "has 2 columns `text`; leave one"),
    ],
)
def test_malformed_prompt_files_are_refused_and_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as failure:
        read_prompts(file)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("prompt", ["7", "\u65e5\u672c", "\U0001f436", "\U0001fae8", "a", "+"])
def test_numbers_signs_and_every_script_are_prompts(tmp_path, prompt):
    (tmp_path / "prompts.txt").write_text(prompt, encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == [prompt]


def test_a_missing_prompt_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such prompt file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "folder.csv")
