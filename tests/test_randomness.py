"""Seeds: all their bits count, small ones draw what they always drew, derived ones have nothing in common."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch

from models.generate import initial_noise
from models.randomness import derived_seed, generator_of, seed_globally
from tests.test_import_boundaries import calls_of

SHAPE = (4, 8, 8)


def noise(*seeds):
    return initial_noise(seeds, SHAPE, device=torch.device("cpu"), dtype=torch.float32)


def test_seeds_that_differ_in_any_bit_draw_other_noise():
    seeds = [7, *(7 + 2**bit for bit in range(3, 63))]
    rows = noise(*seeds).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == len(seeds)
    correlations = rows.corrcoef() - torch.eye(len(seeds))
    assert correlations.abs().max() < 6 / rows.shape[1] ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_small_seeds_draw_what_torch_draws(seed):
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(noise(seed)[0], expected)


@pytest.mark.parametrize("seed", [2**32, 2**32 + 1, 2**63 - 1, 2**64 - 1])
def test_great_seeds_draw_what_numpy_draws(seed):
    """Bit by bit, so the state lies where torch reads it. NumPy gives the last word of the state before it goes on."""
    drawn = torch.randint(2**16, (2000,), generator=generator_of(seed)).numpy()
    np.testing.assert_array_equal(drawn, np.random.MT19937(seed).random_raw(2001)[1:] % 2**16)


def test_the_global_generator_begins_where_a_passed_one_does():
    with torch.random.fork_rng(devices=[]):
        for seed in (3, 2**32 + 3):
            seed_globally(seed)
            assert torch.equal(torch.randn(5), torch.randn(5, generator=generator_of(seed)))


def test_derived_seeds_that_agree_in_their_low_half_draw_other_noise():
    seen: dict[int, int] = {}
    pairs = []
    for step in range(2000):
        for sample in range(96):
            seed = derived_seed("initial noise", 0, step, sample)
            low = seed % 2**32
            if low in seen:
                pairs.append((seen[low], seed))
            seen[low] = seed
    assert pairs  # of 192,000 seeds some 4 pairs do
    for pair in pairs:
        first, second = noise(*pair)
        assert not torch.equal(first, second)


def test_derived_seeds_belong_to_their_purpose_and_numbers():
    numbers = [(), (0,), (1,), (0, 0), (0, 1), (2**32,), (2**32, 0), (2**64,)]
    named = [("b", 0), *(("a", *some) for some in numbers)]
    seeds = [derived_seed(*name) for name in named]
    assert len(set(seeds)) == len(named)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed("a", 2**32, 0) == derived_seed("a", 2**32, 0)


def test_no_code_hands_torch_a_seed_of_which_it_takes_half():
    halved = [
        f"{module}:{call.lineno}"
        for module, call in calls_of("manual_seed")
        if module != "models.randomness" and not isinstance(call.args[0], ast.Constant)
    ]
    assert not halved, "use models.randomness"
