"""Seeds of which every bit counts, and seeds made of others."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

SMALL = 2**32
STATE_WORDS = slice(24, 24 + 8 * 624)  # bytes of a CPU generator's state: the Mersenne Twister's words, an int64 each


def generator_of(seed: int) -> torch.Generator:
    """A CPU generator for a seed in [0, 2^64).

    torch takes 32 bits of it: with its `manual_seed`, 1 and 2^32 + 1 draw the same numbers. Seeds below 2^32 draw what
    torch draws with them; greater ones start from the state that NumPy's Mersenne Twister, the same generator, makes of
    all their bits.
    """
    generator = torch.Generator().manual_seed(seed % SMALL)
    if seed >= SMALL:
        state = generator.get_state()
        words = np.random.MT19937(seed).state["state"]["key"].astype(np.int64)
        state[STATE_WORDS] = torch.from_numpy(words).view(torch.uint8)
        generator.set_state(state)
    return generator


def seed_globally(seed: int) -> None:
    """Put torch's global CPU generator where `generator_of` begins: modules draw their first weights from it."""
    torch.set_rng_state(generator_of(seed).get_state())


def derived_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63) for one purpose, from whole numbers such as the run's seed and the step."""
    digest = hashlib.sha256(json.dumps([purpose, *numbers]).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
