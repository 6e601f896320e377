"""The distribution over solvers: exact at the start, exact in its densities, reproducible in its draws."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Dirichlet, Independent, Normal, kl_divergence
from torch.distributions import LogNormal as TorchLogNormal

from errors import InputError
from schedules import get_schedule, log_gaps
from solvers import EPDTable, classical_table
from tests import golden
from training.parameters import GRID, segments_from_positions
from training.ppo import algorithm
from training.ppo.cold_start import DRAWN, TRAINED, prepare_table
from training.ppo.distributions import (
    MINIMUM_ALPHA,
    dirichlet_entropy,
    dirichlet_kl,
    dirichlet_log_prob,
    sample_log_dirichlet,
)
from training.ppo.policy import EPDParamPolicy, TableSample

ALL = tuple(DRAWN)
TORCH = {"Dirichlet": Dirichlet, "Normal": Normal, "LogNormal": TorchLogNormal}


def random_table(seed: int, intervals: int = 4, points: int = 3) -> EPDTable:
    """A table with every column."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    # No segment is so short that the policy would refuse it at the concentrations tried here.
    segments = (3 * draw(intervals, points + 1)).softmax(-1)
    table = EPDTable(
        segments.cumsum(-1)[:, :-1],
        draw(intervals, points).softmax(-1),
        scale_dir=0.5 + draw(intervals, points),
        scale_time=0.5 + draw(intervals, points),
        guidance=0.5 + 7 * draw(intervals, points + 1),
        history=(draw(intervals, intervals) - 0.5).tril(-1),
        direction_history=(draw(intervals, intervals) - 0.5).tril(-1),
    )
    return prepare_table(table, ALL).table


def grid_of(table: EPDTable) -> torch.Tensor:
    return get_schedule("polynomial", table.num_steps, 0.05, 12.0)


def policy_of(table: EPDTable, train=ALL, *, concentration: float = 20.0, **options) -> EPDParamPolicy:
    return EPDParamPolicy(table, sigmas=grid_of(table), train=train, concentration=concentration, **options)


def moved(policy: EPDParamPolicy, seed: int, size: float = 0.3) -> EPDParamPolicy:
    """The policy after a random change of its last layer, as training makes one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.output.weight.normal_(0, size / 8, generator=generator)
    return policy


def assert_tables_equal(table: EPDTable, expected: EPDTable, tolerance: float) -> None:
    assert table.columns().keys() == expected.columns().keys()
    for name, entries in expected.columns().items():
        torch.testing.assert_close(
            getattr(table, name), entries.expand_as(getattr(table, name)), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("name", ["random", "float32", *golden.table_names()])
def test_the_mean_before_any_update_is_the_table(name):
    if name in ("random", "float32"):
        table = random_table(1)
        table = table if name == "random" else prepare_table(table.to(dtype=torch.float32), ALL).table
    else:
        stored = golden.table(name)
        raw = EPDTable(*(torch.tensor(stored[key], dtype=torch.float64) for key in "rw"))
        table = prepare_table(raw, ALL, guidance_scale=7.5).table
    start = policy_of(table)()
    assert_tables_equal(start.mean_table(), table, 1e-12)
    torch.testing.assert_close(start.mean_sigmas(), grid_of(table), rtol=1e-13, atol=0)
    assert start.mean_sigmas()[[0, -1]].tolist() == grid_of(table)[[0, -1]].tolist()  # the ends to the last bit


@pytest.mark.parametrize("sampler", ["ddim", "ipndm", "dpmpp"])
@pytest.mark.parametrize("train", [("grid",), ("history",), ("positions", "weights", "guidance", "grid"), ALL])
def test_solvers_without_points_are_drawn_too(sampler, train):
    sigmas = get_schedule("logsnr", 5, 0.05, 12.0)
    table = prepare_table(classical_table(sampler, sigmas), train, guidance_scale=3.0).table
    policy = EPDParamPolicy(table, sigmas=sigmas, train=train, concentration=20.0)
    assert set(policy.trained) == set(train) - {"positions", "weights", "scale_dir", "scale_time"}
    assert_tables_equal(policy().mean_table(), table, 1e-12)
    sample = moved(policy, 0)().sample(3, torch.Generator().manual_seed(0))
    assert (sample.table().num_points, sample.table().batch_size) == (0, 3)
    if "grid" in train:
        torch.testing.assert_close(policy.cold_start().mean_sigmas(), sigmas, rtol=1e-13, atol=0)
    else:
        assert sample.sigmas() is policy().mean_sigmas() is None
    distribution = policy()
    assert torch.equal(distribution.log_prob(sample), distribution.log_prob(sample))
    assert distribution.log_prob(sample).isfinite().all()


def test_draws_have_the_mean_that_is_promised():
    table = random_table(2)
    policy = policy_of(table, scale_std=0.3, guidance_std=0.4, history_std=0.2)
    sample = policy().sample(40_000, torch.Generator().manual_seed(0))
    drawn = sample.table().columns() | {GRID: log_gaps(sample.sigmas())}
    for name, expected in (table.columns() | {GRID: log_gaps(grid_of(table))}).items():
        values = drawn[name]
        varying = values.std(0) > 0
        errors = (values.mean(0) - expected).abs()
        assert errors[~varying].max() == 0 if (~varying).any() else varying.all()
        assert (errors / (values.std(0) / math.sqrt(len(values))))[varying].max() < 5, name  # standard errors
        assert (~varying).sum() == (10 if name.endswith("history") else 0)  # of 4 x 4 entries, 6 lie below the diagonal


def test_draws_are_as_wide_as_the_settings_say():
    policy = policy_of(random_table(2), scale_std=0.3, guidance_std=0.4, history_std=0.2, grid_concentration=300.0)
    sample = policy().sample(40_000, torch.Generator().manual_seed(0))
    table = sample.table()
    for values, std in (
        (table.scale_dir.log(), 0.3),
        (table.scale_time.log(), 0.3),
        (table.guidance.log(), 0.4),
        (table.history[:, 1:, 0], 0.2),
        (table.direction_history[:, 3, :3], 0.2),
    ):
        torch.testing.assert_close(values.std(0), torch.full_like(values[0], std), rtol=0.03, atol=0)
    for shares, mean, total in (
        (log_gaps(sample.sigmas()), log_gaps(policy.start[GRID]), 300.0),
        (table.weights, policy.start["weights"], 20.0),
        (segments_from_positions(table.positions), segments_from_positions(policy.start["positions"]), 20.0),
    ):
        torch.testing.assert_close(shares.var(0), mean * (1 - mean) / (total + 1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_each_part_alone_is_drawn_and_scored_and_no_other(name):
    table = random_table(3)
    policy = moved(policy_of(table, (name,)), 1)
    distribution = policy()
    sample = distribution.sample(8, torch.Generator().manual_seed(0))
    drawn, mean = sample.table().columns(), distribution.mean_table().columns()
    for column, entries in table.columns().items():
        same = torch.equal(drawn[column], entries.expand(8, -1, -1)), torch.equal(mean[column], entries)
        assert same == (column != name,) * 2
    assert (sample.sigmas() is not None) == (distribution.mean_sigmas() is not None) == (name == GRID)
    if name == GRID:
        assert (sample.sigmas().diff(dim=-1) < 0).all()
        assert (sample.sigmas()[:, [0, -1]] == grid_of(table)[[0, -1]]).all()
        assert len(sample.sigmas()[:, 1].unique()) == 8
    distribution.log_prob(sample).sum().backward()
    assert policy.output.weight.grad.abs().max() > 0


def test_the_order_in_which_they_are_named_does_not_matter():
    table = random_table(3)
    one, two = policy_of(table, ("grid", "weights", "history")), policy_of(table, ("history", "grid", "weights"))
    first, second = (policy().sample(2, torch.Generator().manual_seed(0)) for policy in (one, two))
    assert one.trained == two.trained == ("weights", "history", "grid")
    assert torch.equal(first.sigmas(), second.sigmas())
    assert_tables_equal(first.table(), second.table(), 0.0)


def test_the_first_update_starts_from_a_gradient_of_every_parameter():
    policy = policy_of(random_table(3))
    distribution = policy()
    sample = distribution.sample(8, torch.Generator().manual_seed(0))
    distribution.log_prob(sample)[0].backward()
    for name, gradient in policy.split(policy.output.bias.grad).items():
        idle = 2 if name.endswith("history") else 0  # no interval comes before the last: its column is never drawn
        assert (gradient == 0).sum() == idle, name
    assert policy.hidden.weight.grad.abs().max() == 0  # behind a zero layer, until it has moved


def test_what_lies_on_and_above_the_diagonal_of_the_history_has_no_parameters():
    policy = policy_of(random_table(4), ("history",))
    residual = torch.zeros_like(policy.base)
    upper = torch.ones(4, 4, dtype=torch.bool).triu()
    residual[:, :4][upper], residual[:, 4:][upper] = 7.0, -1.0
    distribution, start = policy.distribution(residual), policy.cold_start()
    assert torch.equal(distribution.mean_table().history, start.mean_table().history)
    assert distribution.kl(start) == 0
    assert distribution.parts["history"].loc.shape == (1, 6)


def torch_parts(distribution) -> dict:
    """The same distributions by torch, rows as events."""
    found = {}
    for name, part in distribution.parts.items():
        parameters = [part.alpha] if DRAWN[name].spread.endswith("concentration") else [part.loc, part.log_std.exp()]
        made = TORCH[DRAWN[name].family.__name__](*parameters)
        found[name] = made if len(parameters) == 1 else Independent(made, 1)
    return found


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.8, 20.0, 500.0]))
@settings(deadline=None, max_examples=25)
def test_densities_agree_with_torch_distributions(seed, concentration):
    policy = policy_of(
        random_table(seed), concentration=concentration, grid_concentration=2 * concentration, scale_std=0.1
    )
    distribution, start = moved(policy, seed)(), policy.cold_start()
    ours, theirs = torch_parts(distribution), torch_parts(start)
    assert ours.keys() == set(ALL)
    entropy = sum(part.entropy().sum() for part in ours.values())
    torch.testing.assert_close(distribution.entropy(), entropy, rtol=1e-10, atol=1e-8)
    kl = sum(kl_divergence(ours[name], theirs[name]).sum() for name in ALL)
    torch.testing.assert_close(distribution.kl(start), kl, rtol=1e-9, atol=1e-8)
    # Draws that a float can hold, so that torch's densities of them are finite.
    values = {name: part.sample((5,)) for name, part in theirs.items()}
    for name in ("positions", "weights", GRID):
        values[name] = values[name].clamp(min=1e-30) / values[name].clamp(min=1e-30).sum(-1, keepdim=True)
    sample = TableSample(
        {name: drawn if "history" in name else drawn.log() for name, drawn in values.items()}, policy.start
    )
    expected = sum(ours[name].log_prob(drawn).sum(-1) for name, drawn in values.items())
    torch.testing.assert_close(distribution.log_prob(sample), expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_entropy_and_kl_are_the_means_of_the_log_probabilities(name):
    """By Monte Carlo: entropy = -E log p, KL(p || q) = E log p - log q."""
    policy = moved(policy_of(random_table(5), (name,)), 2)
    distribution, start = policy(), policy.cold_start()
    sample = distribution.sample(40_000, torch.Generator().manual_seed(0))
    log_prob, ratio = distribution.log_prob(sample), distribution.log_prob(sample) - start.log_prob(sample)
    for samples, expected in ((-log_prob, distribution.entropy()), (ratio, distribution.kl(start))):
        assert (samples.mean() - expected).abs() < 5 * samples.std() / math.sqrt(len(samples))
    assert distribution.kl(start) > 0.001


def test_gradients_of_the_log_probability_are_right():
    policy = policy_of(random_table(4, 3, 2))
    sample = policy().sample(3, torch.Generator().manual_seed(1))
    residual = 0.1 * torch.randn(policy.base.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    residual.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).log_prob(sample), residual)
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).entropy(), residual)
    assert torch.autograd.gradcheck(lambda values: policy.distribution(values).kl(policy.cold_start()), residual)


def test_float64_matters_and_is_kept():
    table = random_table(5).to(dtype=torch.float32)
    policy = EPDParamPolicy(table, sigmas=grid_of(table).float(), train=ALL, concentration=20.0)
    distribution = policy()
    sample = distribution.sample(4, torch.Generator().manual_seed(0))
    assert distribution.log_prob(sample).dtype == torch.float64
    assert {entries.dtype for entries in sample.table().columns().values()} == {torch.float64}
    assert sample.sigmas().dtype == distribution.mean_sigmas().dtype == torch.float64


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


def test_draws_at_the_edge_are_tables_and_grids():
    policy = policy_of(random_table(6), concentration=0.05, grid_concentration=0.05)
    sample = policy().sample(2_000, torch.Generator().manual_seed(0))
    assert sample.table().positions.diff(dim=-1).min() >= 0  # EPDTable raises outside (0, 1)
    assert (sample.sigmas().diff(dim=-1) < 0).all()  # what the solver asks of a grid
    assert sample.drawn[GRID].exp().min() < 1e-20


def test_draws_depend_on_the_generator_alone():
    distribution = policy_of(random_table(7))()

    def draw(seed):
        return distribution.sample(5, torch.Generator().manual_seed(seed)).drawn

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = draw(3), draw(4)
    for name in ALL:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name][0], first[name][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_on_a_gpu():
    policy = policy_of(random_table(7))
    on_cpu = policy().sample(64, torch.Generator().manual_seed(3))
    log_prob, sigmas = policy().log_prob(on_cpu).detach(), policy().mean_sigmas()
    policy = policy.to("cuda")
    from_cpu = policy().sample(64, torch.Generator().manual_seed(3))  # a CPU generator: the same tables
    for name in ALL:
        torch.testing.assert_close(from_cpu.drawn[name].cpu(), on_cpu.drawn[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(policy().log_prob(from_cpu).detach().cpu(), log_prob, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(policy().mean_sigmas().cpu(), sigmas, rtol=1e-12, atol=0)
    draws = [policy().sample(64, torch.Generator("cuda").manual_seed(3)) for _ in range(2)]
    for name in ALL:
        assert draws[0].drawn[name].device.type == "cuda"
        assert torch.equal(draws[0].drawn[name], draws[1].drawn[name])


def test_the_network_is_seeded_without_touching_the_global_state():
    table = random_table(8)
    state = torch.get_rng_state()
    first, again, other = (EPDParamPolicy(table, concentration=20.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.hidden.weight, again.hidden.weight)
    assert not torch.equal(first.hidden.weight, other.hidden.weight)


def test_selected_tables_keep_their_log_probabilities():
    distribution = policy_of(random_table(10))()
    sample = distribution.sample(6, torch.Generator().manual_seed(0))
    log_prob = distribution.log_prob(sample)
    chosen = sample.select(torch.tensor([4, 1]))
    assert len(chosen) == 2
    assert torch.equal(distribution.log_prob(chosen), log_prob[[4, 1]])
    assert torch.equal(chosen.sigmas(), sample.sigmas()[[4, 1]])
    mask = torch.tensor([True, False, True, False, False, False])
    assert torch.equal(distribution.log_prob(sample.select(mask)), log_prob[mask])


@pytest.mark.parametrize("train", [ALL, ("scale_dir", "weights"), (GRID,)])
def test_a_context_conditions_each_row_on_its_own(train):
    table = random_table(11)
    policy = policy_of(table, train, context_size=2)
    context = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    start = policy(context).mean_table()
    assert start.batch_size == (None if train == (GRID,) else 5)
    assert_tables_equal(start, table, 1e-12)
    distribution = moved(policy, 1)(context)
    sample = distribution.sample(5, torch.Generator().manual_seed(0))
    log_prob = distribution.log_prob(sample)
    assert log_prob.shape == distribution.entropy().shape == distribution.kl(policy.cold_start()).shape == (5,)
    assert sample.table().batch_size == 5
    for row in range(5):
        alone = policy(context[row : row + 1])
        torch.testing.assert_close(alone.log_prob(sample.select(torch.tensor([row])))[0], log_prob[row])
    for name in train:
        mean = distribution.mean_sigmas()[:, 1:-1] if name == GRID else getattr(distribution.mean_table(), name)
        assert (mean.std(0)[mean[0] != 0] > 0).all()
    with pytest.raises(ValueError, match="context of size 2, and got 0"):
        policy()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_kl_is_zero_at_the_start_and_positive_after(seed):
    policy = policy_of(random_table(seed))
    assert policy().kl(policy.cold_start()).item() == pytest.approx(0, abs=1e-10)
    assert moved(policy, seed)().kl(policy.cold_start()).item() > 0


def test_a_move_of_one_is_a_deviation_of_what_is_normal():
    """So that one learning rate suits narrow and wide parts alike: the KL of a move does not depend on the width."""
    for name, narrow, wide in (("history", 0.01, 0.3), ("guidance", 0.01, 0.3), ("scale_dir", 0.01, 0.3)):
        kls = []
        for std in (narrow, wide):
            table = prepare_table(random_table(3), (name,), guidance_scale=2.0).table
            policy = EPDParamPolicy(table, train=(name,), concentration=20.0, **{DRAWN[name].spread: std})
            residual = torch.zeros_like(policy.base)
            residual[2, 0] = 1.0
            kls.append(policy.distribution(residual).kl(policy.cold_start()).item())
        assert kls == pytest.approx([0.5, 0.5])


def test_parameters_at_their_bounds_are_counted():
    policy = policy_of(random_table(12), ("positions", "weights", "scale_dir", "history", GRID))
    residual = torch.zeros_like(policy.base)
    assert policy.distribution(residual).at_bounds == 0
    parts = policy.split(residual)
    parts["positions"][0, 0] = parts["weights"][1, 0] = parts[GRID][3, 0] = -30  # a segment, a weight, a gap
    parts["scale_dir"][2, -1], parts["history"][2, 4] = 20, -20  # log deviations
    parts["history"][2, -1] = 20  # of an entry that is not drawn
    distribution = policy.distribution(residual)
    assert distribution.at_bounds == 5
    assert distribution.parts["positions"].alpha[0, 0] == distribution.parts[GRID].alpha[0, 3] == MINIMUM_ALPHA
    assert distribution.parts["scale_dir"].log_std[2, -1] == 2
    assert distribution.parts["history"].log_std[0, 1] == -7  # row 2's first entry, after row 1's only one


def test_a_state_dict_restores_the_distribution():
    policy = moved(policy_of(random_table(13)), 3)
    other = policy_of(random_table(14), concentration=50.0, seed=9)
    other.load_state_dict(policy.state_dict())
    assert_tables_equal(other().mean_table(), policy().mean_table(), 0.0)
    assert torch.equal(other().mean_sigmas(), policy().mean_sigmas())
    assert other().kl(policy()) == 0
    assert other.cold_start().kl(policy.cold_start()) == 0


def test_what_cannot_be_a_policy_is_refused():
    table = random_table(15)
    with pytest.raises(InputError, match=r"ppo.dirichlet_concentration=1e-05 .* for positions: .* raise it to"):
        EPDParamPolicy(table, concentration=1e-5)
    with pytest.raises(InputError, match=r"ppo.grid_concentration=1e-05 .* for grid: .* raise it to"):
        policy_of(table, (GRID,), grid_concentration=1e-5)
    for std, names in (("scale_std", "scale_time"), ("guidance_std", "guidance"), ("history_std", "history")):
        for value, shown in ((10.0, "10"), (1e300, r"1e\+300"), (1e-300, "1e-300")):
            with pytest.raises(
                InputError, match=rf"ppo\.{std}={shown} is out of range for {names}: it must lie between"
            ):
                policy_of(table, (names,), **{std: value})
    with pytest.raises(InputError, match="a batch of 2"):
        EPDParamPolicy(table.expand(2), concentration=20.0)
    disordered = EPDTable(table.positions.flip(-1), table.weights)
    with pytest.raises(InputError, match=r"names positions, .* must be above 0"):
        EPDParamPolicy(disordered, concentration=20.0)
    with pytest.raises(InputError, match="names grid, and the policy was given no grid"):
        EPDParamPolicy(table, train=(GRID,), concentration=20.0)
    with pytest.raises(InputError, match="names history, and the policy was given no history"):
        EPDParamPolicy(replace(table, history=None), train=("history",), concentration=20.0)
    with pytest.raises(InputError, match=r"names 'segments'; known are positions, weights, .*, grid"):
        EPDParamPolicy(table, train=("segments",), concentration=20.0)
    one = EPDTable(torch.tensor([[0.5]]).double(), torch.tensor([[1.0]]).double())
    for idle in ((), ("weights",), ("history", GRID)):
        with pytest.raises(
            InputError, match=r"nothing of it can vary .* num_steps 2 and num_points 1; name some of pos"
        ):
            policy_of(one, idle)


# --- the reference numbers -------------------------------------------------------------------------------------------


def stored(name):
    return golden.tensor("policy", name)


def reference_case(table_name: str, concentration: float, scale_std: float, deltas: torch.Tensor):
    """Our policy of a stored table, and the residual that gives the reference's parameters.

    The reference puts the scale's location at log(scale), ours is at log(scale) - std^2/2, so that the mean is the
    table: to compare, std^2/2 is added to every location, in `deltas` and in the base. Its locations move by the
    residual, ours by as many deviations.
    """
    arrays = golden.arrays("policy")
    scales = [stored(f"{table_name}__{name}") if f"{table_name}__{name}" in arrays else None for name in SCALES]
    table = EPDTable(stored(f"{table_name}__r"), stored(f"{table_name}__w"), *scales)
    trained = scales[0] is not None
    train = TRAINED + SCALES if trained else TRAINED
    policy = EPDParamPolicy(table, train=train, concentration=concentration, scale_std=scale_std)
    k = table.num_points
    shift, units = torch.zeros_like(policy.base), torch.ones_like(policy.base)
    if trained:
        shift[:, 2 * k + 1 : 3 * k + 1] = shift[:, 4 * k + 1 : 5 * k + 1] = 0.5 * scale_std**2
        units[:, 2 * k + 1 : 3 * k + 1] = units[:, 4 * k + 1 : 5 * k + 1] = scale_std
    return policy, policy.distribution((deltas + shift) / units), policy.distribution(shift / units)


SCALES = ("scale_dir", "scale_time")


def sample_of(policy, *values) -> TableSample:
    """Values of the parts that the reference draws."""
    logs = {name: part.log() for name, part in zip(("positions", "weights", *SCALES), values, strict=False)}
    return TableSample(logs, policy.start)


CASES = [
    (name, concentration, tag)
    for name, tags in (("sd15-distilled", [""]), ("K3S6", [""]), ("K2S5sc", ["ls-3__", "lslog0.05__"]))
    for concentration in (10, 20, 200)
    for tag in tags
]


@pytest.mark.parametrize(("name", "concentration", "tag"), CASES)
def test_distributions_agree_with_the_reference(name, concentration, tag):
    std = {"": 0.05, "ls-3__": math.exp(-3), "lslog0.05__": 0.05}[tag]
    policy, distribution, base = reference_case(name, concentration, std, stored(f"{name}__deltas"))
    key = f"{name}__c{concentration}__{tag}"

    def agree(actual, field, tolerance=1e-10):
        torch.testing.assert_close(actual, stored(key + field), rtol=tolerance, atol=tolerance)

    for part, field in (("positions", "pos"), ("weights", "weight")):
        alpha = distribution.parts[part].alpha
        agree(alpha, f"pert_alpha_{field}")
        agree(dirichlet_entropy(alpha), f"entropy_{field}_pert")
        agree(dirichlet_kl(alpha, base.parts[part].alpha), f"kl_{field}_pert")
    sample = sample_of(policy, *(stored(key + field) for field in ("segments", "weights", *(SCALES if tag else ()))))
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
    parts = distribution.parts
    for actual, field in (
        (parts["positions"].alpha, "alpha_pos"),
        (parts["weights"].alpha, "alpha_weight"),
        (parts["scale_dir"].loc, "scale_dir_loc"),
        (parts["scale_dir"].log_std, "scale_dir_log_std"),
        (parts["scale_time"].loc, "scale_time_loc"),
        (parts["scale_time"].log_std, "scale_time_log_std"),
    ):
        torch.testing.assert_close(actual, stored(f"clamp__pert_{field}"), rtol=1e-10, atol=1e-10)
    assert distribution.at_bounds == 5
    torch.testing.assert_close(distribution.kl(base), stored("clamp__kl_to_base_pert").sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(distribution.entropy(), stored("clamp__entropy_pert").sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["ppo_u1", "ppo_u2"])
def test_the_gradient_of_one_ppo_update_agrees_with_the_reference(name):
    deltas = stored(f"{name}__deltas_new").requires_grad_()
    std = math.exp(stored(f"{name}__scale_log_std_init").item())
    policy, distribution, base = reference_case(name, stored(f"{name}__concentration").item(), std, deltas)
    drawn = ["segments", "weights_sampled", *(f"{scale}_sampled" for scale in (SCALES if name == "ppo_u2" else ()))]
    sample = sample_of(policy, *(stored(f"{name}__{field}") for field in drawn))
    old_log_prob = stored(f"{name}__old_log_prob")
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
