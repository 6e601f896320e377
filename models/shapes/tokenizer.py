"""The tokenizer of the shapes world: a `CLIPTokenizer` in which every word of the vocabulary is one token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from models.shapes.scenes import vocabulary

CONTEXT_LENGTH = 32  # tokens; the longest caption takes 24 with the two marks
START, END = "<|startoftext|>", "<|endoftext|>"
PRINTABLE = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]


def build_tokenizer() -> CLIPTokenizer:
    """Learn byte-pair merges of the vocabulary's words, in CLIP's file format.

    Words outside the vocabulary fall apart into letters: they can be read, but mean nothing to the models. As in CLIP
    the end mark has the highest number, which is how the text towers find it.
    """
    merges = learned_merges(vocabulary())
    pieces = [*PRINTABLE, *(letter + "</w>" for letter in PRINTABLE), *("".join(merge) for merge in merges), START, END]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=CONTEXT_LENGTH)


def learned_merges(words: frozenset[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al., arXiv 1508.07909) until every word is one piece: the most frequent pair first.

    Equally frequent pairs follow the alphabet. The trainer of the `tokenizers` library leaves their order to chance,
    and with it the numbers of words: weights that were trained with one tokenizer would not fit the next.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(words)]
    merges = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        split = [_merged(pieces, merges[-1]) for pieces in split]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word after one merge, from the left."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
