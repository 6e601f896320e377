"""The distribution over tables: exact at the start, exact in its densities, reproducible in its draws."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Dirichlet, Independent, kl_divergence
from torch.distributions import LogNormal as TorchLogNormal

from errors import InputError
from solvers import EPDTable
from tests import golden
from training.ppo import algorithm
from training.ppo.cold_start import prepare_table
from training.ppo.policy import (
    MINIMUM_ALPHA,
    EPDParamPolicy,
    TableSample,
    dirichlet_entropy,
    dirichlet_kl,
    dirichlet_log_prob,
    sample_log_dirichlet,
)


def random_table(seed: int, intervals: int = 4, points: int = 3, scales: bool = True) -> EPDTable:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, intervals, points, generator=generator, dtype=torch.float64)
    # No segment is so short that the policy would refuse it at the concentrations tried here.
    segments = (3 * torch.rand(intervals, points + 1, generator=generator, dtype=torch.float64)).softmax(-1)
    positions = segments.cumsum(-1)[:, :-1]
    table = EPDTable(positions, draw[0].softmax(-1), *((0.5 + draw[1], 0.5 + draw[2]) if scales else (None, None)))
    return prepare_table(table).table


def moved(policy: EPDParamPolicy, seed: int, size: float = 0.3) -> EPDParamPolicy:
    """The policy after a random change of its last layer, as training makes one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.output.weight.normal_(0, size / 8, generator=generator)
    return policy


@pytest.mark.parametrize("name", ["random", "float32", *golden.table_names()])
def test_the_mean_before_any_update_is_the_table(name):
    if name in ("random", "float32"):
        table = random_table(1)
        table = table if name == "random" else prepare_table(table.to(dtype=torch.float32)).table
    else:
        stored = golden.table(name)
        table = prepare_table(EPDTable(*(torch.tensor(stored[key], dtype=torch.float64) for key in "rw"))).table
    policy = EPDParamPolicy(
        table, concentration=20.0, train_scale_dir=True, train_scale_time=table.scale_time is not None
    )
    mean = policy().mean_table()
    torch.testing.assert_close(mean.positions, table.positions, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean.weights, table.weights, rtol=0, atol=1e-12)
    expected = torch.ones_like(mean.weights) if table.scale_dir is None else table.scale_dir
    torch.testing.assert_close(mean.scale_dir, expected, rtol=0, atol=1e-12)
    if table.scale_time is not None:
        torch.testing.assert_close(mean.scale_time, table.scale_time, rtol=0, atol=1e-12)


def test_draws_have_the_mean_that_is_promised():
    table = random_table(2)
    policy = EPDParamPolicy(table, concentration=20.0, train_scale_dir=True, train_scale_time=True, scale_std=0.3)
    drawn = policy().sample(40_000, torch.Generator().manual_seed(0)).table()
    for field in ("positions", "weights", "scale_dir", "scale_time"):
        values = getattr(drawn, field)
        error = (values.mean(0) - getattr(table, field)).abs() / (values.std(0) / math.sqrt(len(values)))
        assert error.max() < 5, field  # standard errors


def test_the_first_update_starts_from_a_gradient():
    policy = EPDParamPolicy(random_table(3), concentration=20.0)
    distribution = policy()
    sample = distribution.sample(8, torch.Generator().manual_seed(0))
    distribution.log_prob(sample)[0].backward()
    assert policy.output.weight.grad.abs().max() > 0
    assert policy.hidden.weight.grad.abs().max() == 0  # behind a zero layer, until it has moved


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.8, 20.0, 500.0]))
@settings(deadline=None, max_examples=25)
def test_densities_agree_with_torch_distributions(seed, concentration):
    policy = moved(
        EPDParamPolicy(
            random_table(seed), concentration=concentration, train_scale_dir=True, train_scale_time=True, scale_std=0.1
        ),
        seed,
    )
    distribution, start = policy(), policy.cold_start()

    def parts(of):
        return [
            Dirichlet(of.alpha_positions),
            Dirichlet(of.alpha_weights),
            Independent(TorchLogNormal(of.scale_dir.loc, of.scale_dir.log_std.exp()), 1),
            Independent(TorchLogNormal(of.scale_time.loc, of.scale_time.log_std.exp()), 1),
        ]

    entropy = sum(part.entropy().sum() for part in parts(distribution))
    torch.testing.assert_close(distribution.entropy(), entropy, rtol=1e-10, atol=1e-8)
    kl = sum(kl_divergence(p, q).sum() for p, q in zip(parts(distribution), parts(start), strict=True))
    torch.testing.assert_close(distribution.kl(start), kl, rtol=1e-9, atol=1e-8)
    # Draws that a float can hold, so that torch's densities of them are finite.
    segments, weights, scale_dir, scale_time = (part.sample((5,)) for part in parts(start))
    segments, weights = (
        (values.clamp(min=1e-30) / values.clamp(min=1e-30).sum(-1, keepdim=True)) for values in (segments, weights)
    )
    sample = TableSample(segments.log(), weights.log(), scale_dir.log(), scale_time.log())
    drawn = zip(parts(distribution), (segments, weights, scale_dir, scale_time), strict=True)
    expected = sum(part.log_prob(values).sum(-1) for part, values in drawn)
    torch.testing.assert_close(distribution.log_prob(sample), expected, rtol=1e-9, atol=1e-8)


def test_gradients_of_the_log_probability_are_right():
    policy = EPDParamPolicy(random_table(4, 2, 2), concentration=20.0, train_scale_dir=True, train_scale_time=True)
    sample = policy().sample(3, torch.Generator().manual_seed(1))
    residual = 0.1 * torch.randn(policy.base.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residual.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).log_prob(sample), residual)
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).entropy(), residual)
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).kl(policy.cold_start()), residual)


def test_float64_matters_and_is_kept():
    policy = EPDParamPolicy(random_table(5).to(dtype=torch.float32), concentration=20.0)
    distribution = policy()
    sample = distribution.sample(4, torch.Generator().manual_seed(0))
    assert distribution.log_prob(sample).dtype == torch.float64
    assert sample.table().positions.dtype == torch.float64


@pytest.mark.parametrize("concentration", [1e-4, 1e-2, 1.0, 100.0])
def test_small_concentrations_keep_finite_log_probabilities(concentration):
    alpha = torch.full((20_000, 3), concentration, dtype=torch.float64)
    log_values = sample_log_dirichlet(alpha, torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_values.logsumexp(-1), torch.zeros(20_000, dtype=torch.float64), rtol=0, atol=1e-9)
    assert dirichlet_log_prob(alpha, log_values).isfinite().all()
    # E log x = digamma(a) - digamma(sum a); its standard error is sqrt((trigamma(a) - trigamma(sum a)) / n)
    expected = alpha[0].digamma() - alpha[0].sum().digamma()
    variance = torch.polygamma(1, alpha[0]) - torch.polygamma(1, alpha[0].sum())
    assert ((log_values.mean(0) - expected).abs() / (variance / 20_000).sqrt()).max() < 5
    if concentration == 1e-4:
        assert (log_values.exp() == 0).any()  # what a draw outside logarithms would have lost


def test_tables_of_draws_at_the_edge_are_tables():
    policy = EPDParamPolicy(random_table(6), concentration=0.05)
    drawn = policy().sample(2_000, torch.Generator().manual_seed(0)).table()  # EPDTable raises outside (0, 1)
    assert drawn.positions.diff(dim=-1).min() >= 0


def test_draws_depend_on_the_generator_alone():
    distribution = EPDParamPolicy(random_table(7), concentration=20.0, train_scale_dir=True)()

    def draw(seed):
        return distribution.sample(5, torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = draw(3), draw(4)
    assert torch.equal(first.log_segments, again.log_segments)
    assert torch.equal(first.log_weights, again.log_weights)
    assert torch.equal(first.log_scale_dir, again.log_scale_dir)
    assert not torch.equal(first.log_segments, other.log_segments)
    assert not torch.equal(first.log_segments[0], first.log_segments[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_on_a_gpu():
    policy = EPDParamPolicy(random_table(7), concentration=20.0, train_scale_dir=True)
    on_cpu = policy().sample(64, torch.Generator().manual_seed(3))
    log_prob = policy().log_prob(on_cpu).detach()
    policy = policy.to("cuda")
    from_cpu = policy().sample(64, torch.Generator().manual_seed(3))  # a CPU generator: the same tables
    torch.testing.assert_close(from_cpu.log_segments.cpu(), on_cpu.log_segments, rtol=0, atol=1e-12)
    torch.testing.assert_close(policy().log_prob(from_cpu).detach().cpu(), log_prob, rtol=1e-12, atol=1e-10)
    draws = [policy().sample(64, torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    assert draws[0].log_segments.device.type == "cuda"
    assert torch.equal(draws[0].log_segments, draws[1].log_segments)


def test_the_network_is_seeded_without_touching_the_global_state():
    table = random_table(8)
    state = torch.get_rng_state()
    first, again, other = (EPDParamPolicy(table, concentration=20.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.hidden.weight, again.hidden.weight)
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


def test_scales_that_are_not_trained_stay_and_count_for_nothing():
    table = random_table(9)
    policy = moved(EPDParamPolicy(table, concentration=20.0, train_scale_time=True), 0)
    distribution = policy()
    sample = distribution.sample(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.table().scale_dir, table.scale_dir.expand(6, -1, -1), rtol=1e-14, atol=0)
    torch.testing.assert_close(distribution.mean_table().scale_dir, table.scale_dir, rtol=0, atol=0)
    assert (sample.table().scale_time != table.scale_time).all()
    without = TableSample(sample.log_segments, sample.log_weights, None, sample.log_scale_time)
    assert torch.equal(distribution.log_prob(sample), distribution.log_prob(without))


def test_selected_tables_keep_their_log_probabilities():
    distribution = EPDParamPolicy(random_table(10), concentration=20.0, train_scale_dir=True)()
    sample = distribution.sample(6, torch.Generator().manual_seed(0))
    log_prob = distribution.log_prob(sample)
    chosen = sample.select(torch.tensor([4, 1]))
    assert len(chosen) == 2
    assert torch.equal(distribution.log_prob(chosen), log_prob[[4, 1]])
    mask = torch.tensor([True, False, True, False, False, False])
    assert torch.equal(distribution.log_prob(sample.select(mask)), log_prob[mask])


def test_a_context_conditions_each_row_on_its_own():
    table = random_table(11)
    policy = EPDParamPolicy(table, concentration=20.0, context_size=2, train_scale_dir=True)
    context = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    start = policy(context).mean_table()
    torch.testing.assert_close(start.positions, table.positions.expand(5, -1, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(start.scale_time, table.scale_time.expand(5, -1, -1), rtol=0, atol=0)
    distribution = moved(policy, 1)(context)
    sample = distribution.sample(5, torch.Generator().manual_seed(0))
    log_prob = distribution.log_prob(sample)
    assert log_prob.shape == distribution.entropy().shape == distribution.kl(policy.cold_start()).shape == (5,)
    for row in range(5):
        alone = policy(context[row : row + 1])
        torch.testing.assert_close(alone.log_prob(sample.select(torch.tensor([row])))[0], log_prob[row])
    assert (policy(context).mean_table().positions.std(0) > 0).all()
    with pytest.raises(ValueError, match="context of size 2, and got 0"):
        policy()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_kl_is_zero_at_the_start_and_positive_after(seed):
    policy = EPDParamPolicy(random_table(seed), concentration=20.0, train_scale_dir=True)
    assert policy().kl(policy.cold_start()).item() == pytest.approx(0, abs=1e-10)
    assert moved(policy, seed)().kl(policy.cold_start()).item() > 0


def test_parameters_at_their_bounds_are_counted():
    policy = EPDParamPolicy(random_table(12), concentration=20.0, train_scale_dir=True)
    residual = torch.zeros_like(policy.base)
    assert policy.distribution(residual).at_bounds == 0
    residual[0, 0], residual[1, 4], residual[2, -1] = -30, -30, 20  # a segment, a weight, a log_std
    distribution = policy.distribution(residual)
    assert distribution.at_bounds == 3
    assert distribution.alpha_positions[0, 0] == MINIMUM_ALPHA
    assert distribution.scale_dir.log_std[2, -1] == 2


def test_a_state_dict_restores_the_distribution():
    policy = moved(EPDParamPolicy(random_table(13), concentration=20.0, train_scale_dir=True), 3)
    other = EPDParamPolicy(random_table(14), concentration=50.0, train_scale_dir=True, seed=9)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other().mean_table().positions, policy().mean_table().positions)
    assert torch.equal(other().mean_table().scale_time, policy().mean_table().scale_time)
    assert torch.equal(other.cold_start().alpha_weights, policy.cold_start().alpha_weights)


def test_what_cannot_be_a_policy_is_refused():
    table = random_table(15)
    with pytest.raises(InputError, match=r"raise ppo\.dirichlet_concentration"):
        EPDParamPolicy(table, concentration=1e-5)
    with pytest.raises(InputError, match="scale_std"):
        EPDParamPolicy(table, concentration=20.0, scale_std=10.0)
    with pytest.raises(InputError, match="a batch of 2"):
        EPDParamPolicy(table.expand(2), concentration=20.0)
    disordered = EPDTable(table.positions.flip(-1), table.weights)
    with pytest.raises(InputError, match="prepare_table"):
        EPDParamPolicy(disordered, concentration=20.0)


# --- the reference numbers -------------------------------------------------------------------------------------------


def stored(name):
    return golden.tensor("policy", name)


def reference_case(table_name: str, concentration: float, scale_std: float, deltas: torch.Tensor):
    """Our policy of a stored table, and the residual that gives the reference's parameters.

    The reference puts the scale's location at log(scale), ours is at log(scale) - std^2/2, so that the mean is the
    table: to compare, std^2/2 is added to every location, in `deltas` and in the base.
    """
    arrays = golden.arrays("policy")
    scales = [stored(f"{table_name}__{name}") if f"{table_name}__{name}" in arrays else None for name in SCALES]
    table = EPDTable(stored(f"{table_name}__r"), stored(f"{table_name}__w"), *scales)
    trained = scales[0] is not None
    policy = EPDParamPolicy(
        table,
        concentration=concentration,
        train_scale_dir=trained,
        train_scale_time=trained,
        scale_std=scale_std,
    )
    k = table.num_points
    shift = torch.zeros_like(policy.base)
    if trained:
        shift[:, 2 * k + 1 : 3 * k + 1] = shift[:, 4 * k + 1 : 5 * k + 1] = 0.5 * scale_std**2
    return policy, policy.distribution(deltas + shift), policy.distribution(shift)


SCALES = ("scale_dir", "scale_time")
CASES = [
    (name, concentration, tag)
    for name, tags in (("sd15-distilled", [""]), ("K3S6", [""]), ("K2S5sc", ["ls-3__", "lslog0.05__"]))
    for concentration in (10, 20, 200)
    for tag in tags
]


@pytest.mark.parametrize(("name", "concentration", "tag"), CASES)
def test_distributions_agree_with_the_reference(name, concentration, tag):
    std = {"": 0.05, "ls-3__": math.exp(-3), "lslog0.05__": 0.05}[tag]
    _, distribution, base = reference_case(name, concentration, std, stored(f"{name}__deltas"))
    key = f"{name}__c{concentration}__{tag}"

    def agree(actual, field, tolerance=1e-10):
        torch.testing.assert_close(actual, stored(key + field), rtol=tolerance, atol=tolerance)

    agree(distribution.alpha_positions, "pert_alpha_pos")
    agree(distribution.alpha_weights, "pert_alpha_weight")
    agree(dirichlet_entropy(distribution.alpha_positions), "entropy_pos_pert")
    agree(dirichlet_entropy(distribution.alpha_weights), "entropy_weight_pert")
    agree(dirichlet_kl(distribution.alpha_positions, base.alpha_positions), "kl_pos_pert")
    agree(dirichlet_kl(distribution.alpha_weights, base.alpha_weights), "kl_weight_pert")
    logs = [stored(key + field).log() for field in ("segments", "weights")]
    logs += [stored(key + field).log() if tag else None for field in SCALES]
    sample = TableSample(*logs)
    for ours, which in ((distribution, "pert"), (base, "base")):
        torch.testing.assert_close(
            ours.log_prob(sample), stored(f"{key}log_prob_{which}").sum(-1), rtol=1e-10, atol=1e-9
        )
        torch.testing.assert_close(ours.entropy(), stored(f"{key}entropy_{which}").sum(), rtol=1e-10, atol=1e-9)
        mean = ours.mean_table()
        agree(mean.positions, f"mean_r_{which}")
        agree(mean.weights, f"mean_w_{which}")
        if tag:
            agree(mean.scale_dir, f"mean_scale_dir_{which}")
            agree(mean.scale_time, f"mean_scale_time_{which}")
    torch.testing.assert_close(distribution.kl(base), stored(f"{key}kl_to_base_pert").sum(), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(sample.table().positions, stored(key + "positions"), rtol=0, atol=1e-12)


def test_the_public_code_starts_above_its_table_and_ours_does_not():
    """Its mean scale at deltas 0 is off by exp(std^2 / 2); ours is the table."""
    key = "K2S5sc__c20__lslog0.05__"
    theirs = stored(key + "mean_scale_dir_base") / stored("K2S5sc__scale_dir")
    torch.testing.assert_close(theirs, torch.full_like(theirs, math.exp(0.05**2 / 2)), rtol=1e-9, atol=0)
    policy, _, _ = reference_case("K2S5sc", 20, 0.05, stored("K2S5sc__deltas"))
    torch.testing.assert_close(policy().mean_table().scale_dir, stored("K2S5sc__scale_dir"), rtol=0, atol=1e-12)


def test_bounds_agree_with_the_reference():
    concentration, log_std = stored("clamp__concentration").item(), stored("clamp__scale_log_std_init").item()
    _, distribution, base = reference_case("clamp", concentration, math.exp(log_std), stored("clamp__deltas"))
    for actual, field in (
        (distribution.alpha_positions, "alpha_pos"),
        (distribution.alpha_weights, "alpha_weight"),
        (distribution.scale_dir.loc, "scale_dir_loc"),
        (distribution.scale_dir.log_std, "scale_dir_log_std"),
        (distribution.scale_time.loc, "scale_time_loc"),
        (distribution.scale_time.log_std, "scale_time_log_std"),
    ):
        torch.testing.assert_close(actual, stored(f"clamp__pert_{field}"), rtol=1e-10, atol=1e-10)
    assert distribution.at_bounds == 5
    torch.testing.assert_close(distribution.kl(base), stored("clamp__kl_to_base_pert").sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(distribution.entropy(), stored("clamp__entropy_pert").sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["ppo_u1", "ppo_u2"])
def test_the_gradient_of_one_ppo_update_agrees_with_the_reference(name):
    deltas = stored(f"{name}__deltas_new").requires_grad_()
    std = math.exp(stored(f"{name}__scale_log_std_init").item())
    _, distribution, base = reference_case(name, stored(f"{name}__concentration").item(), std, deltas)
    logs = [stored(f"{name}__segments").log(), stored(f"{name}__weights_sampled").log()]
    logs += [stored(f"{name}__{scale}_sampled").log() if name == "ppo_u2" else None for scale in SCALES]
    sample, old_log_prob = TableSample(*logs), stored(f"{name}__old_log_prob")
    clip, kl_coef, entropy_coef = stored(f"{name}__hyper_clip_kl_entropy").tolist()
    log_prob, kl, entropy = distribution.log_prob(sample), distribution.kl(base), distribution.entropy()
    policy_loss = algorithm.clipped_surrogate(log_prob, old_log_prob, stored(f"{name}__advantages"), clip)
    loss = algorithm.total_loss(policy_loss, kl, entropy, kl_coef=kl_coef, entropy_coef=entropy_coef)
    loss.backward()
    _, old_distribution, _ = reference_case(
        name, stored(f"{name}__concentration").item(), std, stored(f"{name}__deltas_old")
    )
    for actual, field in (
        (old_distribution.log_prob(sample), "old_log_prob"),
        (log_prob, "new_log_prob"),
        ((log_prob - old_log_prob).exp(), "ratio_per_sample"),
        (policy_loss, "policy_loss"),
        (kl, "kl"),
        (entropy, "entropy"),
        (loss, "loss"),
        (deltas.grad, "grad_wrt_deltas_new"),
    ):
        torch.testing.assert_close(actual.detach(), stored(f"{name}__{field}"), rtol=1e-8, atol=1e-8)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
