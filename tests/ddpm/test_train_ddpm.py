from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from models.pixel_diffusion import load_pixel_diffusion
from models.shapes.train_ddpm import build_network, build_scheduler, main, small_images, velocity_error

LARGEST = 6_000_000  # bytes of the weights that are shipped


class Oracle(nn.Module):
    """Knows the clean images, and so the noise and the velocity."""

    device = torch.device("cpu")

    def __init__(self, clean, alphas):
        super().__init__()
        self.clean, self.alphas = clean, alphas

    def forward(self, noisy, timesteps):
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        return SimpleNamespace(sample=alpha.sqrt() * noise - (1 - alpha).sqrt() * self.clean)


def test_a_network_that_knows_the_velocity_has_no_error():
    clean = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas = build_scheduler().alphas_cumprod
    error = velocity_error(Oracle(clean, alphas), clean, alphas, torch.Generator().manual_seed(1))
    assert error == pytest.approx(0.0, abs=1e-6)


def test_images_are_averaged_down():
    images = torch.zeros(1, 3, 64, 64)
    images[..., ::2, :] = 1.0
    assert torch.equal(small_images(images), torch.zeros(1, 3, 32, 32))


def test_the_command_writes_a_ddpm_that_loads(tmp_path):
    options = {"--output": tmp_path / "ddpm", "--scratch": tmp_path, "--steps": 1, "--images": 8, "--batch": 2}
    result = CliRunner().invoke(main, [str(part) for pair in options.items() for part in pair])
    assert result.exit_code == 0, result.output
    model = load_pixel_diffusion(str(tmp_path / "ddpm"))
    assert model.image_size == (32, 32)
    assert model.clip_range == 1.0
    assert model.prediction_type == "v_prediction"
    assert model.network.state_dict().keys() == build_network().state_dict().keys()
    assert (tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < LARGEST
