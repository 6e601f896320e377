"""What a model needs, counted on shapes alone, against published sizes and what a real call does."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import budget
from benchmarks.budget import CONFIGURATIONS, MostHeld, budget_of, loaded
from models import load_denoiser
from models.options import AS_IT_IS, ModelOptions
from tests.tiny_families import save_tiny_family

SIZE = ModelOptions(height=24, width=16)
PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sd3": {
        "transformer": 2_028_328_000,
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "flux": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
}


@pytest.mark.parametrize("name", budget.KNOWN)
def test_the_parts_have_the_published_sizes(name):
    denoiser, modules = loaded(CONFIGURATIONS / name, AS_IT_IS, torch.bfloat16)
    counts = {part: sum(weight.numel() for weight in module.parameters()) for part, module in modules.items()}
    assert counts == PUBLISHED[name]
    assert denoiser.image_size == ((512, 512) if name == "sd15" else (1024, 1024))
    assert {weight.device.type for module in modules.values() for weight in module.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "ddpm"])
def test_operations_are_those_of_a_real_call(name, tmp_path):
    folder = save_tiny_family(name, tmp_path)
    options = AS_IT_IS if name == "ddpm" else SIZE
    found = budget_of(*loaded(folder, options, torch.float32))
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32, options=options)
    text = denoiser.encode(["" if name == "ddpm" else "a cat"], 1.0)
    x, level = torch.zeros(1, *denoiser.latent_shape), torch.tensor(0.5, dtype=torch.float64)
    calls = {found.row: lambda: denoiser.denoise(x, level, text), found.decoding: lambda: denoiser.decode(x)}
    for work, call in calls.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        assert work.operations == counter.get_total_flops()
    assert (found.row.operations > 0, found.row.memory > x.nbytes) == (True, True)
    assert found.text.operations == 0 if name == "ddpm" else found.text.operations > 0


def test_memory_is_the_most_that_is_held_at_once_and_not_what_was_there():
    layer = nn.Linear(1000, 10, bias=False, device="meta")
    x = torch.zeros(1, 1000, device="meta")
    with torch.no_grad(), MostHeld([x, *layer.parameters()]) as held:
        layer(x).add_(1)  # 40 bytes, in place
        assert held.most == 40
        big = x + 1
        del big
        both = [x + 1, x + 2]
    assert held.most == 8000
    assert len(both) == 2


def test_rows_are_what_is_left_beside_the_weights():
    found = budget.Budget(
        dtype=torch.bfloat16,
        parameters={"transformer": 1000, "vae": 100, "text_encoder": 400, "text_encoder_2": 500},
        text=budget.Work(0, 0),
        row=budget.Work(0, 250),
        decoding=budget.Work(0, 600),
    )
    assert (found.weights(text=True), found.weights(text=False)) == (4000, 2200)
    assert [found.rows_in(memory, text=True) for memory in (4599, 4600, 5000)] == [0, 2, 4]
    assert [found.rows_in(memory, text=False) for memory in (2799, 2800)] == [0, 2]


def test_the_command_says_what_fits(tmp_path, monkeypatch):
    folder = save_tiny_family("flux", tmp_path / "tiny")
    monkeypatch.setattr(budget, "SPARE", 0)
    monkeypatch.setattr(budget, "MEMORIES", (0, 1))
    result = CliRunner().invoke(budget.main, ["--model", str(folder), "--height", "24", "--width", "16"])
    assert result.exit_code == 0, result.output
    for line in ("tiny: images of 24 x 16 pixels, latents (4, 12, 8)", "  transformer", "  a step (one evaluation): "):
        assert line in result.output
    assert "under guidance" not in result.output  # it is one of the network's inputs
    *_, none, some = result.output.splitlines()
    assert none.split() == ["0", "GB", *("float32:", "does", "not", "fit"), *("bfloat16:", "does", "not", "fit")]
    assert some.startswith("     1 GB  float32: ")
    assert "does not fit" not in some
    refused = CliRunner().invoke(budget.main, ["--model", str(tmp_path)])
    assert (refused.exit_code, "no diffusers pipeline" in refused.output) == (2, True)
    absent = CliRunner().invoke(budget.main, ["--model", "shape"]).output
    assert "--model shape: there is no such folder; give a pipeline's, or one of sd15" in absent
