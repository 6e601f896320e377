"""The tokenizer of the shapes world: a `CLIPTokenizer` in which every word of the vocabulary is one token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from models.shapes.scenes import vocabulary

CONTEXT_LENGTH = 32  # tokens; the longest caption takes 29 with the two marks
START, END = "<|startoftext|>", "<|endoftext|>"
PRINTABLE = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]


def build_tokenizer() -> CLIPTokenizer:
    """Learn byte-pair merges of the vocabulary's words, in CLIP's file format.

    Words outside the vocabulary fall apart into letters: they can be read, but mean nothing to the models. As in CLIP
    the end mark has the highest number, which is how the text towers find it.
    """
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    learned.train_from_iterator(sorted(vocabulary()), trainer)
    merges = [tuple(merge) for merge in _merges(learned)]
    pieces = [*PRINTABLE, *(letter + "</w>" for letter in PRINTABLE), *("".join(merge) for merge in merges), START, END]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=CONTEXT_LENGTH)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]
