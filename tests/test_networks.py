"""The parametrisation of a table: the formulas, its inverse, and the published parameters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solvers import EPDTable, ddim_sampler, epd_sampler
from tests import golden
from training.networks import EPD_predictor, near_euler_table


def _double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_a_fresh_predictor_is_evenly_spaced_with_equal_weights_and_scales_of_one():
    table = EPD_predictor(num_steps=4, num_points=3, scale_dir=0.05, scale_time=0.2).table()
    torch.testing.assert_close(table.positions, _double([[0.25, 0.5, 0.75]] * 3), rtol=1e-7, atol=0)
    torch.testing.assert_close(table.weights, _double([[1 / 3] * 3] * 3), rtol=1e-15, atol=0)
    assert table.scale_dir.eq(1).all()
    assert table.scale_time.eq(1).all()


def test_the_table_by_hand():
    predictor = EPD_predictor(num_steps=2, num_points=2, scale_dir=0.5, scale_time=0.1)
    with torch.no_grad():
        predictor.r_params.copy_(torch.tensor([[0.0, math.log(3)]]))
        predictor.weight_s.copy_(torch.tensor([[math.log(2), math.log(6)]]))
        predictor.scale_dir_params.copy_(torch.tensor([[2 * math.log(3), 0.0]]))
        predictor.scale_time_params.copy_(torch.tensor([[0.0, -2 * math.log(4)]]))
    table = predictor.table()
    torch.testing.assert_close(table.positions, _double([[0.5, 0.75]]), rtol=1e-7, atol=0)
    torch.testing.assert_close(table.weights, _double([[0.25, 0.75]]), rtol=1e-7, atol=0)
    # 2 · 3/4 · 0.5 + 0.5 and 2 · 1/5 · 0.1 + 0.9
    torch.testing.assert_close(table.scale_dir, _double([[1.25, 1.0]]), rtol=1e-7, atol=0)
    torch.testing.assert_close(table.scale_time, _double([[1.0, 0.94]]), rtol=1e-7, atol=0)


def test_the_gradient_reaches_every_parameter_and_is_right():
    predictor = EPD_predictor(num_steps=3, num_points=2, scale_dir=0.3, scale_time=0.2).double()
    shape = (2, 2)
    generator = torch.Generator().manual_seed(0)
    names = [name for name, _ in predictor.named_parameters()]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in names]

    def fields(*parameters):
        named = {f"predictor.{name}": value for name, value in zip(names, parameters, strict=True)}
        table = torch.func.functional_call(_Table(predictor), named)
        return table.positions, table.weights, table.scale_dir, table.scale_time

    assert torch.autograd.gradcheck(fields, values)
    gradients = torch.autograd.grad(sum(field.square().sum() for field in fields(*values)), values)
    assert all(gradient.abs().min() > 0 for gradient in gradients)


class _Table(torch.nn.Module):
    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self):
        return self.predictor.table()


@st.composite
def tables(draw):
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    weights = uniform(0.001, 1)
    return EPDTable(
        positions=uniform(0.001, 0.999),
        weights=weights / weights.sum(-1, keepdim=True),
        scale_dir=draw(st.sampled_from([None, uniform(0.8, 1.2)])),
        scale_time=draw(st.sampled_from([None, uniform(0.5, 1.5), torch.ones(shape, dtype=torch.float64)])),
    )


@given(tables())
def test_from_table_inverts_table(table):
    again = EPD_predictor.from_table(table).table()
    for field in ("positions", "weights", "scale_dir", "scale_time"):
        torch.testing.assert_close(getattr(again, field), getattr(table, field), rtol=0, atol=5e-7)


def test_a_wanted_bound_is_kept_where_the_scales_lie_inside_it_and_widened_where_they_do_not():
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    table = EPDTable(half, half, scale_dir=_double([[0.98, 1.02]]))
    assert EPD_predictor.from_table(table, {"scale_dir": 0.05}).scale_dir == 0.05
    assert EPD_predictor.from_table(table, {"scale_dir": 0.02}).scale_dir == pytest.approx(0.03)
    assert EPD_predictor.from_table(EPDTable(half, half), {"scale_dir": 0.05}).table().scale_dir is None


def test_fcn_forces_the_last_direction_scales_to_one():
    predictor = EPD_predictor(num_steps=3, num_points=2, scale_dir=0.5, fcn=True)
    with torch.no_grad():
        predictor.scale_dir_params.fill_(2.0)
    scale = predictor.table().scale_dir
    assert scale[-1].eq(1).all()
    assert scale[0].gt(1.1).all()
    again = EPD_predictor.from_table(predictor.table(), predictor.metadata)
    assert again.fcn is False
    torch.testing.assert_close(again.table().scale_dir, scale, rtol=0, atol=5e-7)


def test_metadata_lists_what_the_predictor_was_given_and_makes_one_alike():
    predictor = EPD_predictor(num_steps=5, num_points=2, guidance_rate=7.5, backend_config={"resolution": 512})
    assert predictor.metadata["guidance_rate"] == 7.5
    assert predictor.metadata["backend_config"] == {"resolution": 512}
    assert predictor.metadata["num_steps"] == 5
    assert EPD_predictor(**predictor.metadata).metadata == predictor.metadata


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 1},
        {"num_points": 0},
        {"scale_dir": -0.1},
        {"scale_time": math.nan},
        {"table": 3},
        {"r_params": 3},
        {"_hidden": 3},
    ],
)
def test_what_cannot_be_a_predictor_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EPD_predictor(**{"num_steps": 3, **wrong})


def test_a_batch_of_tables_is_refused():
    half = torch.full((3, 1, 2), 0.5)
    with pytest.raises(ValueError, match=r"\[S, K\]"):
        EPD_predictor.from_table(EPDTable(half, half))


@golden.needs_golden
@pytest.mark.parametrize("name", golden.table_names())
def test_published_parameters_give_the_published_tables(name):
    published = golden.table(name)
    predictor = EPD_predictor(published["num_steps"], published["num_points"])
    with torch.no_grad():
        for parameter, rows in published["logits"].items():
            predictor.get_parameter(parameter).copy_(torch.tensor(rows))
    table = predictor.table()
    torch.testing.assert_close(table.positions, _double(published["r"]), rtol=1e-14, atol=0)
    torch.testing.assert_close(table.weights, _double(published["w"]), rtol=1e-14, atol=0)
    assert table.scale_dir is table.scale_time is None


@golden.needs_golden
@pytest.mark.parametrize(("name", "bounds"), [("K3S6sc", (0.05, 0.2)), ("K3S5flowsc", (0.05, 0.02))])
def test_scales_agree_with_the_reference(name, bounds):
    def stored(key):
        return golden.tensor("solvers", f"table_{name}__{key}").double()

    rows, points = stored("r").shape
    predictor = EPD_predictor(rows + 1, points, *bounds).double()
    with torch.no_grad():
        for parameter in ("r_params", "weight_s", "scale_dir_params", "scale_time_params"):
            predictor.get_parameter(parameter).copy_(stored(f"logits_{parameter}"))
    table = predictor.table()
    found = {"r": table.positions, "w": table.weights, "scale_dir": table.scale_dir, "scale_time": table.scale_time}
    for key, tensor in found.items():
        expected = stored(key)
        torch.testing.assert_close(
            torch.ones_like(expected) if tensor is None else tensor, expected, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("num_points", [1, 2, 5])
def test_the_untrained_table_goes_nearly_where_ddim_goes_and_the_even_one_does_not(num_points):
    sigmas = torch.tensor([14.6, 1.6, 0.03], dtype=torch.float64)
    x = 14.6 * torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x, sigma):  # of a narrow Gaussian pushed away from 0, as strong guidance does
        return 3 * x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)

    wanted = ddim_sampler(denoise, x, sigmas)
    near = epd_sampler(denoise, x, sigmas, near_euler_table(2, num_points))
    even = epd_sampler(denoise, x, sigmas, EPD_predictor(num_steps=3, num_points=num_points).table())
    assert (near - wanted).norm() < 0.25 * (even - wanted).norm()
