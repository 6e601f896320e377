"""Upsampling by copies is torch's nearest interpolation, and keeps its gradient where it is compiled."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from errors import InputError
from models.devices import check_compiler
from models.upsampling import double_by_copies


@pytest.mark.parametrize("size", [None, (14, 10), (13, 9), (13, 10)])
@pytest.mark.parametrize("use_conv", [True, False])
def test_copies_are_the_nearest_interpolation_at_even_and_odd_sizes(size, use_conv):
    torch.manual_seed(0)
    interpolated = Upsample2D(4, use_conv=use_conv)
    copied = copy.deepcopy(interpolated)
    double_by_copies(copied)
    double_by_copies(copied)  # a network may be compiled twice
    features = torch.randn(2, 4, 7, 5, requires_grad=True)
    found = [layer(features, size) for layer in (copied, interpolated)]
    assert torch.equal(*found)
    torch.testing.assert_close(*(torch.autograd.grad(one.square().sum(), features)[0] for one in found))


@pytest.mark.slow
def test_compiled_in_half_precision_the_layers_below_keep_their_gradient():
    try:
        check_compiler(torch.device("cpu"))
    except InputError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), Upsample2D(8, use_conv=True), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    features = torch.randn(4, 8, 8, 8)

    def gradient(asked):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            drawn = asked(features)
        drawn.float().square().mean().backward()
        return network[0].weight.grad.clone()

    eager = gradient(network)
    double_by_copies(network)
    torch.testing.assert_close(gradient(torch.compile(network)), eager, rtol=0.02, atol=1e-4)
