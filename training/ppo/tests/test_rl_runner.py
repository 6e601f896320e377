"""Rollouts: which prompt, noise and table meet in which image, whatever the micro-batch, the process or the memory."""

import itertools
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import schedules
from errors import InputError
from models.generate import initial_noise
from models.randomness import derived_seed
from models.registry import load_denoiser
from solvers import EPDTable, classical_table, epd_sampler
from tests.tiny_pipeline import save_tiny_pipeline
from training.ppo.cold_start import DRAWN, prepare_table
from training.ppo.policy import EPDParamPolicy
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import RLRunner, Shard, usual_rows
from training.ppo.rollout import PromptStream
from training.ppo.tests.analytic import (
    PROMPTS,
    Brightness,
    GaussianDenoiser,
    brightness,
    cold_start_table,
    in_two_processes,
)
from training.solver import Solver

K = 3
SIGMAS = schedules.get_schedule("logsnr", 3, GaussianDenoiser.sigma_min, GaussianDenoiser.sigma_max)
SOLVER = Solver("epd", "epd", len(SIGMAS), table=cold_start_table(), sigmas=SIGMAS)


def runner(denoiser=None, reward=None, solver=SOLVER, **settings):
    settings = {"group_size": K, "shared_noise": False, "seed": 5, "dtype": torch.float64} | settings
    denoiser = denoiser or GaussianDenoiser()
    return RLRunner(denoiser, solver.on(denoiser), reward or brightness(), **settings)


def batch(number=4) -> tuple[str, ...]:
    return PromptStream(PROMPTS, shuffle=False, seed=0).take(number)


def tables(number=4 * K) -> EPDTable:
    policy = EPDParamPolicy(cold_start_table(), concentration=5.0)
    return policy().sample(number, torch.Generator().manual_seed(0)).table()


def test_each_image_comes_from_its_own_prompt_seed_and_table():
    rolled = runner()
    images = rolled.roll_out(tables(), batch(), step=7)
    assert images.pixels.shape == (4 * K, 3, 2, 2)
    assert images.prompts == tuple(itertools.chain.from_iterable([text] * K for text in PROMPTS[:4]))
    assert images.finite.all()
    denoiser = GaussianDenoiser()
    for row in range(4 * K):
        conditioning = denoiser.encode([PROMPTS[row // K]])
        seed = derived_seed("initial noise", 5, 7, row // K, row % K)
        start = SIGMAS[0] * initial_noise([seed], (4, 2, 2), device=torch.device("cpu"), dtype=torch.float64)
        latent = epd_sampler(
            lambda x, s, c=conditioning: denoiser.denoise(x, s, c), start, SIGMAS, tables().select(row)
        )
        assert torch.equal(images.pixels[row], denoiser.decode(latent)[0])


def drawn(train=tuple(DRAWN), number=4 * K) -> tuple[EPDTable, torch.Tensor | None]:
    """Tables and noise levels that differ in all that `train` names."""
    table = prepare_table(cold_start_table(), train, guidance_scale=2.0).table
    policy = EPDParamPolicy(table, sigmas=SIGMAS, train=train, concentration=5.0, guidance_std=0.3, history_std=0.3)
    sample = policy().sample(number, torch.Generator().manual_seed(0))
    return sample.table(), sample.sigmas()


@pytest.mark.parametrize("train", [tuple(DRAWN), ("grid",), ("guidance",), ("history",)])
def test_each_image_comes_from_its_own_columns_and_noise_levels(train):
    table, sigmas = drawn(train)
    images = runner(max_rows=28).roll_out(table, batch(), 7, sigmas)
    denoiser = GaussianDenoiser()
    latents = []
    for row in range(4 * K):
        conditioning = denoiser.encode([PROMPTS[row // K]])
        seed = derived_seed("initial noise", 5, 7, row // K, row % K)
        own = SIGMAS if sigmas is None else sigmas[row]
        start = own[0] * initial_noise([seed], (4, 2, 2), device=torch.device("cpu"), dtype=torch.float64)
        latents.append(epd_sampler(partial(asked, denoiser, conditioning), start, own, table.select(row)))
    expected = denoiser.decode(torch.cat(latents))
    torch.testing.assert_close(images.pixels, expected, rtol=0, atol=1e-6)
    other = runner().roll_out(drawn(("positions",))[0], batch(), 7).pixels
    assert not torch.allclose(images.pixels, other, atol=1e-3)


@pytest.mark.parametrize("name", DRAWN)
def test_rewards_are_differentiable_in_every_number_by_the_road_that_scores_them(name):
    """Against finite differences; the network's calls are made again, one by one, for the backward pass."""
    table, sigmas = drawn()
    denoiser = GaussianDenoiser()
    rolled = runner(denoiser, max_rows=28)

    def rewards(entries):
        numbers = {**table.columns(), "grid": sigmas, name: entries}
        levels = numbers.pop("grid")
        return rolled.score(rolled.roll_out(EPDTable(**numbers), batch(), 7, levels)).rewards

    start = {**table.columns(), "grid": sigmas}[name]
    entries = start.clone().requires_grad_()
    scores = rewards(entries)
    calls = len(denoiser.rows)
    (gradient,) = torch.autograd.grad(scores.sum(), entries)
    assert len(denoiser.rows) > calls
    place = {"grid": (..., 1), "history": (..., 1, 0), "direction_history": (..., 1, 0)}.get(name, (..., 1, 1))
    step = torch.zeros_like(start)
    step[place] = 1e-3 if name != "grid" else 3e-3
    if name == "weights":
        step[..., 1, 0] = -1e-3  # so that they sum to 1
    difference = rewards(start + step) - rewards(start - step)
    slope = 2 * (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(slope, difference, rtol=2e-2, atol=3e-7)
    assert slope.abs().max() > 1e-5
    assert not rewards(start).requires_grad


def asked(denoiser, conditioning, x, sigma, *guidance):
    return denoiser.denoise(x, sigma, conditioning, *guidance)


def test_processes_share_drawn_noise_levels_too():
    table, sigmas = drawn()
    whole = runner().roll_out(table, batch(), 2, sigmas)
    halves = [runner(shard=Shard(rank, 2)).roll_out(table, batch(), 2, sigmas) for rank in range(2)]
    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)


def test_guided_rows_alone_count_twice_towards_the_most_at_once():
    """Of an interval's start and its three points, with no, one, or all evaluations guided."""
    points = prepare_table(cold_start_table(2, 3)).table
    counted = []
    for guidance in ([1, 1, 1, 1], [3, 1, 1, 1], [1, 2, 1, 1], [1, 2, 0.5, 4], [9, 2, 2, 2]):
        column = torch.ones(2, 4, dtype=torch.float64)
        column[1] = torch.tensor(guidance)
        solver = replace(SOLVER, guidance_scale=7.5).with_numbers(replace(points, guidance=column), None)
        assert solver.guidance_scale is None  # the column's scales are all that count
        counted.append(solver.rows_at_once)
    assert counted == [3, 3, 4, 6, 6]
    assert [SOLVER.guided(scale).with_numbers(points, None).rows_at_once for scale in (1.0, 2.0)] == [3, 6]
    none = classical_table("ddim", SIGMAS)
    batch_of = replace(none.expand(3), guidance=torch.tensor([[[1.0], [1.0]], [[1.0], [2.0]], [[1.0], [1.0]]]).double())
    assert [SOLVER.with_numbers(table, None).rows_at_once for table in (none, batch_of)] == [2, 2]
    assert SOLVER.with_numbers(batch_of, None).select(slice(0, 1)).rows_at_once == 1


def test_a_rollout_is_what_replay_makes_of_the_same_table():
    table, seeds, prompts = cold_start_table(), [11, 12, 13, 14], list(PROMPTS[:4])
    images = runner(dtype=torch.float32).sample_images(table, prompts, seeds)
    latents = SOLVER.on(GaussianDenoiser()).latents(GaussianDenoiser(), prompts, seeds)
    assert torch.equal(images.pixels, GaussianDenoiser().decode(latents))


def test_afs_and_guidance_reach_the_solver_and_the_model():
    plain = runner().roll_out(tables(), batch(), 0).pixels
    denoiser = GaussianDenoiser()
    fast = runner(denoiser, solver=replace(SOLVER, afs=True)).roll_out(tables(), batch(), 0).pixels
    assert denoiser.rows == [24, 12, 24]  # without the first direction
    unguided = runner(solver=SOLVER.guided(1.0)).roll_out(tables(), batch(), 0).pixels
    assert not torch.allclose(plain, fast, atol=1e-3)
    assert not torch.allclose(plain, unguided, atol=1e-3)


@pytest.mark.parametrize("max_rows", [1, 4, 20, 28, 1000])
def test_micro_batches_change_nothing(max_rows):
    whole = runner().roll_out(tables(), batch(), 3)
    denoiser = GaussianDenoiser()
    split = runner(denoiser, max_rows=max_rows).roll_out(tables(), batch(), 3)
    assert torch.equal(split.pixels, whole.pixels)
    assert split.prompts == whole.prompts
    assert max(denoiser.rows) * 2 <= max(max_rows, 4)  # two guidance halves a row; one image with two points at least


def test_memory_that_does_not_suffice_halves_the_batch_and_remembers(caplog):
    whole = runner().roll_out(tables(), batch(), 3)
    denoiser = GaussianDenoiser(memory=7)
    small = runner(denoiser)
    assert torch.equal(small.roll_out(tables(), batch(), 3).pixels, whole.pixels)
    assert "from now on 3 (max_rows 12)" in caplog.text
    denoiser.rows.clear()
    small.roll_out(tables(), batch(), 4)
    assert max(denoiser.rows) == 6
    resumed = runner(GaussianDenoiser(memory=7))
    resumed.load_state_dict(small.state_dict())
    resumed.roll_out(tables(), batch(), 4)
    assert resumed.denoiser.rows == denoiser.rows


def test_the_network_is_compiled_for_an_interval_s_start_and_again_where_memory_is_too_little():
    class Compiled(GaussianDenoiser):
        asked = ()

        def compile_network(self, rows):
            self.asked += (*rows,)

    for images, max_rows, asked in ((24, 28, 14), (4, 28, 8), (24, None, 32)):  # two points, two rows each
        source = runner(Compiled(), max_rows=max_rows)
        source.compile_network(images)
        assert source.denoiser.asked == (asked,)
    small = runner(Compiled(memory=7))
    small.compile_network(12)
    small.roll_out(tables(), batch(), 3)
    assert small.denoiser.asked == (24, 12, 6)
    resumed = runner(Compiled(memory=7))
    resumed.compile_network(12)
    resumed.load_state_dict(small.state_dict())
    assert resumed.denoiser.asked == (24, 6)


def test_on_cuda_a_call_holds_fewer_rows_of_larger_images():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    rows = [usual_rows(cuda, (4, side, side)) for side in (64, 128, 96, 2048)]
    assert rows == [128, 32, 56, 1]
    assert usual_rows(cpu, (4, 64, 64)) == 64


def test_a_limit_of_rows_set_at_resume_wins_over_the_checkpoints():
    limited = runner(GaussianDenoiser(memory=7), max_rows=40)
    limited.roll_out(tables(), batch(), 3)
    state = limited.state_dict()
    same, lower, higher = (runner(max_rows=rows) for rows in (40, 8, 80))
    for resumed in (same, lower, higher):
        resumed.load_state_dict(state)
    assert limited.max_rows < 40
    assert (same.max_rows, lower.max_rows, higher.max_rows) == (limited.max_rows, 8, 80)


def test_memory_that_does_not_suffice_for_one_image_is_a_clear_error():
    with pytest.raises(InputError, match="does not suffice for one image"):
        runner(GaussianDenoiser(memory=1)).roll_out(tables(), batch(), 0)


def noise_seeds(shared, step):
    source = runner(shared_noise=shared)
    return [[source.noise_seed(step, prompt, member) for member in range(K)] for prompt in range(4)]


def test_noise_is_shared_inside_a_group_where_asked_for_and_nowhere_else():
    shared, distinct = noise_seeds(True, 0), noise_seeds(False, 0)
    assert all(len(set(group)) == 1 for group in shared)
    assert len({group[0] for group in shared}) == 4
    assert len(set(itertools.chain.from_iterable(distinct))) == 4 * K
    assert set(itertools.chain.from_iterable(distinct)).isdisjoint(itertools.chain.from_iterable(noise_seeds(False, 1)))
    assert runner(seed=6, shared_noise=True).noise_seed(0, 0, 0) != shared[0][0]


def test_with_shared_noise_equal_tables_make_equal_images():
    one = cold_start_table().expand(4 * K)
    shared = runner(shared_noise=True).roll_out(one, batch(), 0).pixels.view(4, K, -1)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert not torch.equal(shared[0, 0], shared[1, 0])
    distinct = runner(shared_noise=False).roll_out(one, batch(), 0).pixels.view(4, K, -1)
    assert not torch.equal(distinct[:, 0], distinct[:, 1])


@pytest.mark.parametrize("train", [("positions",), ("positions", "grid")])
def test_samples_that_begin_alike_share_their_first_evaluation(train):
    """One row a prompt in the place of K, and the images are those that each sample's own evaluation makes."""
    table, sigmas = drawn(train)
    denoiser = GaussianDenoiser()
    images = runner(denoiser, shared_noise=True).roll_out(table, batch(), 7, sigmas)
    assert denoiser.rows == [4, 24, 12, 24]
    rolled = runner(shared_noise=True)
    for row in range(4 * K):
        own = None if sigmas is None else sigmas[row]
        seed = rolled.noise_seed(7, row // K, row % K)
        alone = rolled.sample_images(table.select(row), [PROMPTS[row // K]], [seed], own).pixels[0]
        torch.testing.assert_close(images.pixels[row], alone, rtol=0, atol=1e-6)


def first_rows(train, **settings):
    denoiser = GaussianDenoiser()
    table, sigmas = drawn(train)
    runner(denoiser, **{"shared_noise": True} | settings).roll_out(table, batch(), 7, sigmas)
    return denoiser.rows[0]


def test_samples_that_do_not_begin_alike_share_nothing():
    """Other noise, other guidance of a network that has no unconditional half; with AFS there is nothing to share."""
    assert first_rows(("positions",), shared_noise=False) == 4 * K
    assert first_rows(("guidance",)) == 4 * K
    assert first_rows(("positions",), solver=replace(SOLVER, afs=True)) == 2 * 4 * K


def test_samples_that_carry_a_gradient_share_nothing():
    table, _ = drawn(("positions",))
    wanted = replace(table, positions=table.positions.clone().requires_grad_())
    denoiser = GaussianDenoiser()
    runner(denoiser, shared_noise=True).roll_out(wanted, batch(), 7)
    assert denoiser.rows == [12, 24, 12, 24]


def test_drawn_guidance_shares_both_halves_of_the_first_evaluation(tmp_path):
    """A real network's: two rows a prompt in the place of 2 K, and the same images."""
    denoiser = load_denoiser(save_tiny_pipeline(tmp_path / "model"), device="cpu", dtype=torch.float64)
    sigmas = schedules.get_schedule("logsnr", 3, denoiser.sigma_min, denoiser.sigma_max)
    table, _ = drawn(("guidance", "positions"))
    rolled = runner(denoiser, solver=replace(SOLVER, sigmas=sigmas), shared_noise=True)
    prompts = ("red", "green")
    rows = []
    handle = denoiser.network.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    images = rolled.roll_out(table.select(slice(2 * K)), prompts, 7).pixels
    handle.remove()
    assert rows == [2 * 2, 2 * 4 * K, 2 * 2 * K, 2 * 4 * K]
    for row in range(2 * K):
        seed = rolled.noise_seed(7, row // K, row % K)
        alone = rolled.sample_images(table.select(row), [prompts[row // K]], [seed]).pixels[0]
        torch.testing.assert_close(images[row], alone, rtol=0, atol=1e-6)


def test_the_watch_asks_for_the_start_of_its_samples_once():
    one, other = (cold_start_table(2, points) for points in (2, 3))
    denoiser = GaussianDenoiser()
    watched, prompts, seeds = runner(denoiser), list(PROMPTS[:4]), [11, 12, 13, 14]
    first = watched.sample_images(one, prompts, seeds).pixels
    assert torch.equal(watched.sample_images(one, prompts, seeds).pixels, first)
    assert denoiser.rows == [4, 8, 4, 8, 8, 4, 8]
    assert torch.equal(
        watched.sample_images(other, prompts, seeds).pixels, runner().sample_images(other, prompts, seeds).pixels
    )
    for changed in ((prompts[::-1], seeds), (prompts, [15, 12, 13, 14])):
        assert torch.equal(watched.sample_images(one, *changed).pixels, runner().sample_images(one, *changed).pixels)
    levels = SIGMAS * 0.9
    assert torch.equal(
        watched.sample_images(one, prompts, seeds, levels).pixels,
        runner().sample_images(one, prompts, seeds, levels).pixels,
    )
    guided = replace(one, guidance=torch.full((2, 3), 1.5, dtype=torch.float64))
    assert torch.equal(
        watched.sample_images(guided, prompts, seeds).pixels, runner().sample_images(guided, prompts, seeds).pixels
    )


def test_scores_are_those_of_the_reward_in_order():
    source = runner()
    images = source.roll_out(tables(), batch(), 0)
    scores = source.score(images)
    expected = Brightness().score(images.pixels, images.prompts)
    assert torch.equal(scores.rewards, expected.double())
    assert torch.equal(scores.parts["brightness"], expected)


class Explosive(GaussianDenoiser):
    """Decodes the latents of the prompt `blue` to NaN."""

    def denoise(self, x, sigma, conditioning, guidance=None):
        blue = self.encode(["blue"]).text["mean"]
        lost = (conditioning.rows(len(x))["mean"] == blue).all(1)
        return torch.where(lost[:, None, None, None], torch.inf, super().denoise(x, sigma, conditioning))


class Strict(Brightness):
    """A reward that must never be shown what is not an image."""

    def score(self, images, prompts):
        assert images.isfinite().all()
        return super().score(images, prompts)


def test_images_that_are_not_finite_get_no_score():
    source = runner(Explosive(), WeightedMix({"strict": (Strict(), 1.0)}))
    images = source.roll_out(tables(), batch(), 0)
    assert images.finite.view(4, K).tolist() == [[True] * K, [True] * K, [False] * K, [True] * K]
    scores = source.score(images)
    assert scores.rewards.isnan().view(4, K).tolist() == (~images.finite).view(4, K).tolist()
    assert source.state_dict()["reward"]["strict"]["count"] == 3 * K
    only = ("blue", "blue")
    assert source.score(source.roll_out(tables(2 * K), only, 0)).rewards.isnan().all()


def test_processes_share_the_work_and_agree():
    whole = runner(shared_noise=False)
    expected = whole.score(whole.roll_out(tables(), batch(), 2)).rewards

    def process(shard):
        source = runner(shared_noise=False, shard=shard)
        images = source.roll_out(tables(), batch(), 2)
        return len(images.pixels), source.score(images).rewards

    for images, rewards in in_two_processes(process):
        assert images == 2 * K
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="3 prompts cannot be split evenly among 2"):
        runner(shard=Shard(0, 2)).roll_out(tables(3 * K), batch(3), 0)


def test_every_phase_is_timed():
    source = runner()
    source.score(source.roll_out(tables(), batch(), 0))
    seconds = source.take_seconds()
    assert seconds.keys() == {"text", "network", "solver", "decode", "reward"}
    assert all(spent > 0 for spent in seconds.values())
    assert source.take_seconds() == {}


def test_prompts_in_order_wrap_around():
    stream = PromptStream(PROMPTS, shuffle=False, seed=0)
    assert stream.take(4) == PROMPTS[:4]
    assert stream.take(4) == (PROMPTS[4], PROMPTS[5], PROMPTS[0], PROMPTS[1])


def test_shuffled_prompts_come_once_an_epoch_in_a_new_order():
    stream = PromptStream(PROMPTS, shuffle=True, seed=3)
    taken = [prompt for _ in range(9) for prompt in stream.take(4)]  # 36 prompts, 6 epochs
    epochs = [tuple(taken[start : start + 6]) for start in range(0, 36, 6)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len(set(epochs)) > 3
    again = PromptStream(PROMPTS, shuffle=True, seed=3)
    assert list(again.take(36)) == taken  # the batch size does not matter
    assert list(PromptStream(PROMPTS, shuffle=True, seed=4).take(36)) != taken


def test_a_prompt_stream_goes_on_where_it_was():
    stream = PromptStream(PROMPTS, shuffle=True, seed=3)
    stream.take(8)
    resumed = PromptStream(PROMPTS, shuffle=True, seed=3)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(10) == stream.take(10)


def test_a_prompt_stream_refuses_another_streams_place():
    state = PromptStream(PROMPTS, shuffle=True, seed=3).state_dict()
    with pytest.raises(InputError, match=r"other prompts and run\.seed:"):
        PromptStream(PROMPTS[:3], shuffle=True, seed=4).load_state_dict(state)
    with pytest.raises(InputError, match=r"other data\.shuffle:"):
        PromptStream(PROMPTS, shuffle=False, seed=3).load_state_dict(state)
    with pytest.raises(InputError, match="no prompts"):
        PromptStream([], shuffle=False, seed=0)


@pytest.mark.integration
def test_a_real_model_rolls_out_real_tables_and_a_real_reward_scores_them(integration):
    trainer, denoiser = integration.parts.trainer, integration.parts.denoiser
    tables = trainer.policy().sample(8, torch.Generator().manual_seed(0)).table()
    prompts = trainer.prompts.take(2)
    images = trainer.source.roll_out(tables, prompts, step=0)
    assert images.pixels.shape == (8, 3, *denoiser.image_size)
    assert images.finite.all()
    assert 0 <= images.pixels.min() < images.pixels.max() <= 1
    assert (images.pixels.std((1, 2, 3)) > 0.02).all()
    first, second = images.pixels.flatten(1).split(4)
    assert (first - first.mean(0)).abs().mean() < (first - second).abs().mean()  # a group shares prompt and noise
    rewards = trainer.source.score(images).rewards
    assert rewards.isfinite().all()
    assert rewards.std() > 0
    again = trainer.source.roll_out(tables, prompts, step=0)
    assert torch.equal(again.pixels, images.pixels)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
