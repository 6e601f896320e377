"""The trainer: its gradient is the score-function gradient, it finds known optima, a resumed run is the same run."""

import io
import math
import sys

import pytest
import torch

import schedules
from errors import InputError
from models.mixture import MixtureWorld
from models.pictures import as_png, to_pixels
from solvers import EPDTable, classical_table, epd_sampler
from training.ppo import algorithm
from training.ppo.cold_start import prepare_table
from training.ppo.config import PPOConfig
from training.ppo.distributions import sample_log_dirichlet
from training.ppo.policy import EPDParamPolicy
from training.ppo.ppo_trainer import METRICS, PPOTrainer
from training.ppo.rewards.mix import WeightedMix
from training.ppo.rl_runner import RLRunner
from training.ppo.rollout import DivergenceError, PromptStream, Scores
from training.ppo.tests.analytic import PROMPTS, GaussianDenoiser, QuadraticSource, brightness, cold_start_table
from training.solver import Solver

TARGET = EPDTable(
    torch.tensor([[0.15, 0.6], [0.45, 0.8]], dtype=torch.float64),
    torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64),
)


def settings(**values) -> PPOConfig:
    defaults = {"rollout_batch_size": 16, "rloo_k": 4, "minibatch_size": 16, "steps": 100, "shared_noise": False}
    return PPOConfig(**(defaults | values))


def trainer(config=None, source=None, *, policy=None, prompts=PROMPTS, seed=0) -> PPOTrainer:
    config = config or settings()
    return PPOTrainer(
        policy or EPDParamPolicy(cold_start_table(), concentration=config.dirichlet_concentration, seed=seed),
        source or QuadraticSource(TARGET, config.rloo_k),
        PromptStream(prompts, shuffle=True, seed=seed),
        config,
        seed=seed,
    )


def diffusion_trainer(config=None, reward=None, *, seed=0, **runner) -> PPOTrainer:
    config = config or settings()
    sigmas = schedules.get_schedule("logsnr", 3, GaussianDenoiser.sigma_min, GaussianDenoiser.sigma_max)
    source = RLRunner(
        GaussianDenoiser(),
        Solver("epd", "epd", 3, table=cold_start_table(), sigmas=sigmas).on(GaussianDenoiser()),
        reward or brightness(),
        **({"group_size": config.rloo_k, "shared_noise": config.shared_noise, "seed": seed} | runner),
    )
    train = ("positions", "weights", "scale_dir", "scale_time")
    policy = EPDParamPolicy(prepare_table(cold_start_table(), train).table, train=train, concentration=20.0, seed=seed)
    return trainer(config, source, policy=policy, seed=seed)


def parameters(of: PPOTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.policy.parameters()])


# --- the gradient ----------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_score_function_gradient_by_hand():
    """d log Dirichlet / d log alpha_j = alpha_j (log x_j - digamma(alpha_j) + digamma(sum alpha)), here times -A."""
    subject = trainer(settings(max_grad_norm=1e9), prompts=PROMPTS[:1])
    subject.step()
    twin = trainer(prompts=PROMPTS[:1])  # the same draws
    distribution = twin.policy()
    sample = distribution.sample(16, twin.generator)
    tables = sample.table()
    distance = (tables.positions - TARGET.positions).square() + (tables.weights - TARGET.weights).square()
    rewards = -distance.sum((1, 2)).view(4, 4)
    advantages = torch.stack(
        [group[j] - (group.sum() - group[j]) / 3 for group in rewards for j in range(4)]  # leave one out
    )
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    columns = []
    for name, log_values in sample.drawn.items():
        alpha = distribution.parts[name].alpha
        score = alpha * (log_values - alpha.digamma() + alpha.sum(-1, keepdim=True).digamma())  # [n, S, M]
        columns.append(-(advantages[:, None, None] * score).mean(0).sum(0))  # the output's bias moves every interval
    torch.testing.assert_close(subject.policy.output.bias.grad, torch.cat(columns).detach(), rtol=0, atol=1e-10)


def test_the_mixed_baseline_reaches_the_update():
    """The gradient is that of the chosen advantages, and the two choices differ."""
    gradients = []
    for baseline in ("prompt", "mixed"):
        subject = trainer(settings(baseline=baseline, max_grad_norm=1e9))
        subject.step()
        sample = trainer().policy().sample(16, trainer().generator)
        stream = trainer().prompts
        rewards = subject.source.score(subject.source.roll_out(sample.table(), stream.take(4), 0)).rewards
        advantages = algorithm.normalize(algorithm.leave_one_out_advantages(rewards, 4, baseline=baseline))
        twin = trainer()
        (-(advantages * twin.policy().log_prob(sample)).mean()).backward()
        torch.testing.assert_close(subject.policy.output.bias.grad, twin.policy.output.bias.grad, rtol=0, atol=1e-10)
        gradients.append(subject.policy.output.bias.grad)
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-2)


def test_the_gradient_is_clipped_to_its_norm():
    subject = trainer(settings(max_grad_norm=0.01))
    record = subject.step()
    norm = torch.stack([parameter.grad.norm() for parameter in subject.policy.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-4)
    assert record["gradient_norm"] > 0.1  # logged before it is clipped


@pytest.mark.parametrize("baseline", ["prompt", "mixed"])
def test_the_estimator_is_unbiased(baseline):
    """E[-(w - t)^2] under a Dirichlet is known; its gradient is the mean of (leave-one-out advantage) * (score)."""
    log_alpha = torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    alpha, total = log_alpha.exp(), log_alpha.exp().sum()
    mean = alpha / total
    variance = mean * (1 - mean) / (total + 1)
    exact = torch.autograd.grad(-(variance + (mean - target) ** 2).sum(), log_alpha)[0]
    n, k = 40_000, 4
    alpha = log_alpha.detach().exp()
    log_weights = sample_log_dirichlet(alpha.expand(n, 3), torch.Generator().manual_seed(1))
    offsets = torch.arange(n // k).remainder(7).double().repeat_interleave(k)  # prompts differ in difficulty
    rewards = offsets - ((log_weights.exp() - target) ** 2).sum(-1)
    advantages = algorithm.leave_one_out_advantages(rewards, k, baseline=baseline)
    scores = alpha * (log_weights - alpha.digamma() + alpha.sum().digamma())
    samples = advantages[:, None] * scores
    error = (samples.mean(0) - exact).abs() / (samples.std(0) / n**0.5)
    assert error.max() < 5  # standard errors
    if baseline == "prompt":
        assert (samples.std(0) < 0.6).all()
    else:
        assert (samples.std(0) > 1).all()  # as unbiased, but the prompts' spread is in it


# --- finding optima --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_it_finds_the_optimum_of_a_quadratic(schedule):
    subject = trainer(
        settings(
            rollout_batch_size=32, minibatch_size=32, learning_rate=3e-3, learning_rate_schedule=schedule, steps=400
        )
    )
    records = [subject.step() for _ in range(400)]
    mean = subject.policy().mean_table()
    torch.testing.assert_close(mean.positions, TARGET.positions, rtol=0, atol=0.03)
    torch.testing.assert_close(mean.weights, TARGET.weights, rtol=0, atol=0.03)
    assert records[-1]["reward/distance"] < 0.1 * records[0]["reward/distance"]
    assert records[-1]["entropy"] < records[0]["entropy"]  # it narrows where it is right


def test_several_epochs_and_minibatches_learn_too():
    subject = trainer(settings(rollout_batch_size=32, minibatch_size=8, ppo_epochs=3, learning_rate=2e-3, steps=50))
    first, *_, last = [subject.step() for _ in range(50)]
    assert last["reward/distance"] < 0.3 * first["reward/distance"]
    assert first["first_pass_ratio_error"] == 0
    assert last["approximate_kl"] > 0
    assert last["effective_sample_share"] < 1


def test_the_kl_term_holds_the_policy_at_its_start():
    free, held = (trainer(settings(kl_coef=kl_coef, learning_rate=3e-3)) for kl_coef in (0.0, 100.0))
    for _ in range(60):
        free_record, held_record = free.step(), held.step()
    assert held_record["kl"] < 0.01 * free_record["kl"]


def test_the_entropy_term_widens_the_policy():
    plain, wide = (trainer(settings(entropy_coef=entropy_coef, learning_rate=3e-3)) for entropy_coef in (0.0, 10.0))
    start = plain.policy().entropy().item()
    for _ in range(60):
        plain.step()
        wide.step()
    assert wide.policy().entropy().item() > start > plain.policy().entropy().item()


class Closeness:
    """Minus the mean squared distance of an image to the one that its prompt stands for."""

    name = "closeness"

    def score(self, images, prompts):
        denoiser = GaussianDenoiser()
        conditioning = denoiser.encode(prompts)
        latents = conditioning.guidance_scale * conditioning.text["mean"][:, :, None, None].expand(-1, -1, 2, 2)
        return -(images - denoiser.decode(latents)).square().mean((1, 2, 3))


def test_it_learns_through_the_solver():
    """Rollouts of the closed-form denoiser, judged before and after on noise that training never saw."""
    config = settings(rollout_batch_size=32, minibatch_size=32, shared_noise=True, learning_rate=3e-3, steps=60)
    reward = WeightedMix({"closeness": (Closeness(), 1.0)})
    subject = diffusion_trainer(config, reward)
    prompts, seeds = PROMPTS * 8, range(48)

    def heldout():
        images = subject.source.sample_images(subject.policy().mean_table(), prompts, seeds)
        return reward.score(images.pixels, images.prompts)

    before = heldout()
    for _ in range(60):
        subject.step()
    gain = heldout() - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


class Distance:
    """A `RolloutSource` in the closed-form world: minus the distance of what a table makes of noise to the solution."""

    world = MixtureWorld(16)

    def __init__(self, sigmas, group_size):
        self.sigmas, self.group_size = sigmas, group_size

    def distance(self, noise, table, sigmas=None):
        x = self.world.sigma_max * noise
        found = epd_sampler(self.world.denoise, x, self.sigmas if sigmas is None else sigmas, table)
        exact = self.world.solution(x, self.world.sigma_max, self.world.sigma_min)
        return (found - exact).square().flatten(1).mean(1).sqrt()

    def noise(self, seed, number):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(number, *self.world.latent_shape, generator=generator, dtype=torch.float64)

    def roll_out(self, tables, prompts, step, sigmas=None):
        noise = self.noise(1000 + step, len(prompts)).repeat_interleave(self.group_size, 0)
        return -self.distance(noise, tables, sigmas)

    def score(self, outcome):
        return Scores(outcome, {"distance": outcome})

    def take_seconds(self):
        return {}


def test_it_learns_grid_and_history_without_points():
    sigmas = schedules.get_schedule("polynomial", 6, Distance.world.sigma_min, Distance.world.sigma_max)
    config = settings(rollout_batch_size=64, rloo_k=8, minibatch_size=64, steps=60, train=["history", "grid"])
    start = prepare_table(classical_table("ipndm", sigmas), config.train).table
    policy = EPDParamPolicy(start, sigmas=sigmas, train=config.train, concentration=config.dirichlet_concentration)
    source = Distance(sigmas, config.rloo_k)
    subject = trainer(config, source, policy=policy)
    for _ in range(60):
        assert subject.step()["first_pass_ratio_error"] == 0
    heldout, mean = source.noise(0, 256), subject.policy()
    table, grid = mean.mean_table(), mean.mean_sigmas()
    neither, both = source.distance(heldout, start).mean(), source.distance(heldout, table, grid).mean()
    assert both < 0.8 * neither
    for one in (source.distance(heldout, table), source.distance(heldout, start, grid)):
        assert both < one.mean() < neither


def test_what_is_drawn_is_what_is_tried_and_scored():
    class Noted(Distance):
        def roll_out(self, tables, prompts, step, sigmas=None):
            self.tried = tables, sigmas
            return super().roll_out(tables, prompts, step, sigmas)

    sigmas = schedules.get_schedule("polynomial", 4, Distance.world.sigma_min, Distance.world.sigma_max)
    for train in (["history", "grid"], ["history"]):
        table = prepare_table(classical_table("ddim", sigmas), train).table
        one, other = (
            trainer(source=Noted(sigmas, 4), policy=EPDParamPolicy(table, sigmas=sigmas, train=train, concentration=20))
            for _ in range(2)
        )
        one.step()
        drawn = other.policy().sample(16, other.generator)
        tried, levels = one.source.tried
        assert torch.equal(tried.history, drawn.table().history)
        assert (levels is None) == ("grid" not in train)
        assert levels is None or torch.equal(levels, drawn.sigmas())


# --- invariants ------------------------------------------------------------------------------------------------------


def test_the_first_pass_after_a_rollout_has_ratio_one_exactly():
    for subject in (trainer(), diffusion_trainer(settings(minibatch_size=4, ppo_epochs=2, learning_rate=1e-2))):
        for _ in range(5):
            assert subject.step()["first_pass_ratio_error"] == 0


def test_micro_batches_of_the_rollout_do_not_change_the_update():
    whole, split = diffusion_trainer(max_rows=10_000), diffusion_trainer(max_rows=12)
    for _ in range(3):
        whole.step()
        split.step()
    torch.testing.assert_close(parameters(split), parameters(whole), rtol=0, atol=1e-7)
    assert (parameters(whole) != parameters(diffusion_trainer())).any()


def test_the_same_seed_is_the_same_run_and_another_is_another():
    runs = [diffusion_trainer(seed=seed) for seed in (1, 1, 2)]
    records = [[run.step()["reward_mean"] for _ in range(3)] for run in runs]
    assert records[0] == records[1]
    assert records[0] != records[2]
    assert torch.equal(parameters(runs[0]), parameters(runs[1]))


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    diffusion_trainer().step()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_learning_rate_of_almost_zero_leaves_the_mean_at_the_table():
    subject = trainer(settings(learning_rate=1e-300))
    subject.step()
    torch.testing.assert_close(
        subject.policy().mean_table().positions, cold_start_table().positions, rtol=0, atol=1e-12
    )


def test_the_learning_rate_follows_its_schedule():
    subject = trainer(settings(steps=4, learning_rate=1e-3, learning_rate_schedule="linear"))
    assert [subject.step()["learning_rate"] for _ in range(4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


# --- resuming --------------------------------------------------------------------------------------------------------


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("make", [trainer, diffusion_trainer])
def test_a_resumed_run_is_the_same_run_to_the_last_bit(make):
    config = settings(minibatch_size=8, ppo_epochs=2, learning_rate=3e-3)
    whole = make(config)
    first = [whole.step() for _ in range(3)]
    state = through_a_file(whole.state_dict())
    rest = [whole.step() for _ in range(4)]
    resumed = make(config)
    resumed.load_state_dict(state)
    again = [resumed.step() for _ in range(4)]

    def without_times(records):
        return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]

    assert without_times(again) == without_times(rest)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert [record["step"] for record in first + again] == [1, 2, 3, 4, 5, 6, 7]
    assert again[-1]["images"] == 7 * 16


def test_a_state_of_other_prompts_is_refused_before_anything_is_changed():
    state = trainer(prompts=PROMPTS[:5]).state_dict()
    subject = trainer()
    before = parameters(subject).clone()
    with pytest.raises(InputError, match="other prompts"):
        subject.load_state_dict(state)
    assert torch.equal(parameters(subject), before)


# --- rewards that are not finite -------------------------------------------------------------------------------------


class Faulty(QuadraticSource):
    """Rewards that are not finite for some samples."""

    def __init__(self, faults: dict[int, float]) -> None:
        super().__init__(TARGET, 4)
        self.faults = faults

    def score(self, outcome):
        scores = super().score(outcome)
        rewards = scores.rewards.clone()
        for row, value in self.faults.items():
            rewards[row] = value
        return Scores(rewards, scores.parts)


def test_a_group_with_a_reward_that_is_not_finite_is_dropped_whole():
    faults = {5: float("nan"), 14: float("inf")}
    subject, clean = trainer(source=Faulty(faults)), trainer()
    record = subject.step()
    assert record["dropped_groups"] == 2
    assert record["reward_max"] < 100
    sample = clean.policy().sample(16, clean.generator)
    kept = torch.tensor([*range(4), *range(8, 12)])  # groups 0 and 2
    prompts = clean.prompts.take(4)
    scores = clean.source.score(clean.source.roll_out(sample.table(), prompts, 0))
    assert record["reward_mean"] == pytest.approx(scores.rewards[kept].mean().item())
    advantages = algorithm.normalize(algorithm.leave_one_out_advantages(scores.rewards[kept], 4))
    distribution = clean.policy()
    loss = -(advantages * distribution.log_prob(sample.select(kept))).mean()
    loss.backward()
    norm = clean.policy.output.bias.grad.norm()
    ours = subject.policy.output.bias.grad
    torch.testing.assert_close(ours / ours.norm(), clean.policy.output.bias.grad / norm, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("share", "faulty_groups", "stops"), [(0.5, 2, False), (0.5, 3, True), (1.0, 4, True)])
def test_too_many_such_groups_stop_the_run_with_a_clear_message(share, faulty_groups, stops):
    faults = {4 * group: float("nan") for group in range(faulty_groups)}
    subject = trainer(settings(max_nonfinite_share=share), Faulty(faults))
    before = parameters(subject).clone()
    if not stops:
        assert subject.step()["dropped_groups"] == faulty_groups
        return
    with pytest.raises(DivergenceError, match=r"step 1: \d+% of the groups .* lower ppo\.learning_rate"):
        subject.step()
    assert torch.equal(parameters(subject), before)


@pytest.mark.parametrize(
    ("minibatch_size", "what"), [(8, "the norm of the gradient"), (16, "the KL divergence between the policies")]
)
def test_an_update_that_goes_too_far_stops_the_run_with_a_clear_message(minibatch_size, what):
    subject = trainer(settings(minibatch_size=minibatch_size, learning_rate=1e4))
    with pytest.raises(DivergenceError, match=rf"step 1: {what} .* lower ppo\.learning_rate"):
        subject.step()


def test_an_update_that_leaves_no_table_stops_the_run_with_a_clear_message():
    subject = trainer(settings(learning_rate=1.0, ppo_epochs=3))
    with pytest.raises(DivergenceError, match=r"step 1: the mean table is none any more .* lower ppo\.learning_rate"):
        subject.step()


# --- what is logged --------------------------------------------------------------------------------------------------


def test_every_metric_is_in_the_glossary_and_every_entry_is_logged():
    record = diffusion_trainer().step()
    named = {name for name in record if not name.startswith(("reward/", "seconds/"))}
    assert named == METRICS.keys()
    assert {name for name in record if name.startswith("reward/")} == {"reward/brightness"}
    assert {name for name in record if name.startswith("seconds/")} == {
        f"seconds/{phase}" for phase in ("text", "network", "solver", "decode", "reward", "update", "step")
    }
    assert all(isinstance(value, int | float) for value in record.values())


def test_reward_variances_show_prompts_and_tables_apart():
    record = trainer().step()
    assert record["reward_between_variance"] > 1  # 3 * the prompt's index
    assert 0 < record["reward_within_variance"] < 0.1
    uniform = prepare_table(cold_start_table()).table
    silent = trainer(policy=EPDParamPolicy(uniform, concentration=1e9)).step()
    assert silent["reward_within_variance"] < 1e-6


@pytest.mark.integration
def test_it_trains_a_real_start_and_the_images_can_be_looked_at(integration):
    """Two steps; then an image of the mean table for each of four prompts."""
    subject, start = integration.parts.trainer, integration.start.table
    for step in (1, 2):
        record = subject.step()
        assert record["step"] == step
        assert record["first_pass_ratio_error"] == 0
        assert record["dropped_groups"] == 0
        assert math.isfinite(record["reward_mean"])
    with torch.no_grad():
        table = subject.policy().mean_table().to(device="cpu")
    assert 0 < (table.positions - start.positions).abs().max() < 0.5
    prompts = subject.prompts.take(4)
    images = subject.source.sample_images(table, prompts, range(4))
    assert images.finite.all()
    integration.pictures.mkdir(exist_ok=True)
    for number, pixels in enumerate(to_pixels(images.pixels)):
        story = {"prompt": prompts[number], "seed": str(number), "step": "2"}
        file = integration.pictures / f"ppo_trainer_integration_sample_{number}.png"
        file.write_bytes(as_png(pixels, story))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
