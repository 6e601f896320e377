"""The one road to an image: noise belongs to its seed, images to their prompt and seed, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from models import load_denoiser
from models.generate import LATENT_LIMIT, decode, initial_noise, recomputed
from solvers import SAMPLERS
from tests.tiny_pipeline import save_tiny_pipeline
from training.solver import Solver

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
PROMPTS = ["red box", "a cat", "blue", "red box", "dog"]
SEEDS = [3, 1, 4, 1, 5]
SIGMAS = torch.tensor([14.6, 3.0, 0.8, 0.1], dtype=torch.float64)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return load_denoiser(save_tiny_pipeline(tmp_path_factory.mktemp("tiny")), device=CPU, dtype=torch.float32)


EULER = Solver("ddim", "ddim", len(SIGMAS), sigmas=SIGMAS)


def drawn(denoiser, prompts=PROMPTS, seeds=SEEDS, scale=None, **options):
    return replace(EULER, guidance_scale=scale).on(denoiser).latents(denoiser, prompts, seeds, **options)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.data())
@settings(max_examples=25, deadline=None)
def test_noise_is_that_of_the_seed_alone_to_the_last_bit(seeds, data):
    noise = initial_noise(seeds, SHAPE, device=CPU, dtype=torch.float32)
    order = data.draw(st.permutations(range(len(seeds))))
    permuted = initial_noise([seeds[index] for index in order], SHAPE, device=CPU, dtype=torch.float32)
    assert torch.equal(permuted, noise[list(order)])
    alone = initial_noise(seeds[:1], SHAPE, device=CPU, dtype=torch.float64)
    assert torch.equal(alone[0], noise[0].double())


def test_noise_is_standard_normal_and_differs_between_seeds():
    noise = initial_noise(range(200), SHAPE, device=CPU, dtype=torch.float32)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert len({float(row[0, 0, 0]) for row in noise}) == 200


def test_generating_leaves_the_global_random_state_alone(denoiser):
    before = torch.random.get_rng_state()
    drawn(denoiser)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_start_is_the_first_level_times_the_noise_in_the_type_asked_for(denoiser, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "ddim", lambda denoise, x, sigmas, **_: x)
    latents = drawn(denoiser, dtype=torch.float64)
    noise = initial_noise(SEEDS, SHAPE, device=CPU, dtype=torch.float64)
    assert torch.equal(latents, SIGMAS[0] * noise)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batch_size_never_changes_an_image(denoiser, batch_size):
    """In float32 the last bits may move with the shape of a matrix product; an image of 256 levels does not see it."""
    together = drawn(denoiser, batch_size=5)
    split = drawn(denoiser, batch_size=batch_size)
    torch.testing.assert_close(split, together, rtol=0.0, atol=2e-5 * float(together.abs().max()))


def test_an_image_is_that_of_its_own_prompt_and_seed(denoiser):
    together = drawn(denoiser, batch_size=2)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = drawn(denoiser, [prompt], [seed])
        torch.testing.assert_close(alone[0], together[row], rtol=0.0, atol=2e-5 * float(together.abs().max()))
    assert (together[0] - together[3]).abs().max() > 0.1  # one prompt, two seeds
    assert (together[1] - together[3]).abs().max() > 1e-3  # one seed, two prompts


def test_embeddings_do_not_depend_on_the_batch_to_the_last_bit(denoiser, tmp_path):
    together = denoiser.encode(PROMPTS).text["encoder_hidden_states"]
    fresh = load_denoiser(save_tiny_pipeline(tmp_path), device=CPU, dtype=torch.float32)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(fresh.encode([prompt]).text["encoder_hidden_states"][0], together[row])


def test_guidance_reaches_the_model(denoiser):
    plain, default, strong = (drawn(denoiser, scale=scale) for scale in (1.0, None, 7.5))
    assert torch.equal(default, strong)
    assert (plain - strong).abs().max() > 1e-3


def test_no_gradient_is_kept(denoiser):
    assert not drawn(denoiser).requires_grad


def test_wrong_counts_are_errors(denoiser):
    with pytest.raises(ValueError, match="as many prompts as seeds"):
        drawn(denoiser, PROMPTS, SEEDS[:2])
    with pytest.raises(ValueError, match="at least one"):
        drawn(denoiser, [], [])
    with pytest.raises(ValueError, match="batch_size"):
        drawn(denoiser, batch_size=0)


def test_each_call_of_the_network_says_of_how_many_latents(denoiser):
    calls: list[int] = []
    drawn(denoiser, batch_size=2, asked=calls.append)
    assert calls == [2, 2, 2, 2, 2, 2, 1, 1, 1]


def test_what_was_lost_on_the_way_is_marked_and_black_or_clamped(denoiser):
    latents = torch.zeros(4, *SHAPE)
    latents[1, 0, 0, 0], latents[2, 0, 0, 0] = torch.nan, 2 * LATENT_LIMIT
    decoded = decode(denoiser, latents)
    assert decoded.solved.tolist() == [True, False, False, True]
    assert decoded.decoded.all()
    assert torch.equal(decoded.images[1], decoded.images[0])  # the one number that was none counts as 0
    assert decoded.images.isfinite().all()
    assert decoded.fine.tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_through_half_precision_on_a_cpu_takes_the_plain_attention(dtype):
    def attend(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x).sin()

    x = torch.randn(1, 2, 8, 16, dtype=dtype, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        recomputed(attend, x, dtype=dtype).sum().backward()
    fused = any("flash" in event.key for event in profiled.key_averages())
    assert fused == (dtype == torch.float32)
