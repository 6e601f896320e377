"""Every family against diffusers' own pipeline with its own scheduler, and what each refuses in a line."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, SD3Transformer2DModel, UNet2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from benchmarks.compvis_layout import compvis_state_dict
from errors import InputError
from models import load_denoiser
from models.compvis import assemble_compvis, read_compvis
from models.denoiser import Conditioning, GuidanceKind
from models.families.stable_diffusion_3 import T5_TOKENS, SharedTokenAttention
from models.fingerprints import file_sha256, model_fingerprint
from models.generate import conditioned
from models.latent_diffusion import LatentDiffusion
from models.options import AS_IT_IS, ModelOptions
from models.pipelines import contents_of, load_folder
from models.registry import check_assets, traits_of
from schedules import get_schedule
from solvers import SAMPLERS, EPDTable, classical_table, epd_sampler
from tests.test_latent_diffusion import WaitsForTheDevice
from tests.tiny_families import save_flat_ddpm, save_tiny_family, stock_pipeline
from tests.tiny_pipeline import TOKEN_LIMIT, modules_of, save_tiny_pipeline
from training.solver import Solver, classical_solver, parse_schedule

PROMPTS = ["red box", "a big cat", "blue"]
HEIGHT, WIDTH = 24, 16
SIZE = ModelOptions(height=HEIGHT, width=WIDTH)


@dataclass(frozen=True)
class Family:
    """A pipeline to be made, the arguments of the stock pipeline that ours is like, and the guidance it is tried at."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)
    scales: tuple[float, ...] = (1.0, 4.5)


FAMILIES = {
    "sdxl": Family("sdxl"),
    "sdxl, v": Family("sdxl", {"prediction_type": "v_prediction"}),
    "sd3": Family("sd3"),
    "sd3 without T5": Family("sd3", {"with_t5": False}),
    "sd3, dynamic shift": Family("sd3", {"use_dynamic_shifting": True}),
    "flux": Family("flux"),
    "flux without guidance": Family("flux", {"guided": False}, {"max_sequence_length": 256}, scales=(1.0,)),
}
CASES = [(name, scale) for name, family in FAMILIES.items() for scale in family.scales]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's pipeline, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            family = FAMILIES[name]
            made[name] = save_tiny_family(family.name, tmp_path_factory.mktemp(family.name), **family.options)
        return made[name]

    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, options: ModelOptions = SIZE) -> LatentDiffusion:
    return load_denoiser(folder, device="cpu", dtype=dtype, options=options)


def noise(denoiser: LatentDiffusion, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Stock:
    """The stock pipeline, asked for what starts at given latents in our scaling."""

    def __init__(self, name: str, folder: Path) -> None:
        self.family, self.pipeline = FAMILIES[name], stock_pipeline(folder)

    def __call__(self, start: Tensor, scale: float, **steps: object) -> Tensor:
        """Images [N, 3, H, W], or latents where `output_type` says so."""
        latents = start
        if self.family.name == "flux":
            latents = FluxPipeline._pack_latents(start, *start.shape)
        if self.family.name == "sdxl":  # it multiplies by that to begin with
            self.pipeline.scheduler.set_timesteps(**{"num_inference_steps": None, **steps})
            latents = start / self.pipeline.scheduler.init_noise_sigma
        arguments = {"latents": latents, "height": HEIGHT, "width": WIDTH, "output_type": "pt", "guidance_scale": scale}
        return self.pipeline(PROMPTS, **arguments, **self.family.arguments, **steps).images

    def estimate(self, x: Tensor, scale: float, step: float) -> tuple[Tensor, Tensor]:
        """The level of a step in (0, 1), and the decoded D(x, level): one step of Euler's method from there to 0."""
        if self.family.name == "sdxl":
            images = self(x, scale, timesteps=[round(1000 * step)])
        else:
            images = self(x, scale, num_inference_steps=1, sigmas=[step])
        return self.pipeline.scheduler.sigmas[0].double(), images


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_an_estimate_is_that_of_the_stock_pipeline(name, scale, folder_of):
    """Three prompts with two points each, in one call."""
    denoiser, stock = load(folder_of(name)), Stock(name, folder_of(name))
    x = noise(denoiser, 6).unflatten(0, (3, 2))
    expected = [stock.estimate(x[:, point], scale, step) for point, step in enumerate((0.9, 0.3))]
    levels = torch.stack([level for level, _ in expected]).expand(3, 2)
    with torch.no_grad():
        estimates = denoiser.denoise(x.flatten(0, 1), levels.flatten(), denoiser.encode(PROMPTS, scale))
        images = denoiser.decode(estimates)
    torch.testing.assert_close(images.unflatten(0, (3, 2)), torch.stack([image for _, image in expected], 1), **CLOSE)


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_a_trajectory_is_that_of_the_stock_pipeline(name, scale, folder_of):
    """Four steps of Euler's method, the last of them to 0, text and guidance and decoding included."""
    denoiser, stock = load(folder_of(name)), Stock(name, folder_of(name))
    start = noise(denoiser)
    if stock.family.name == "sdxl":
        stock.pipeline.scheduler.set_timesteps(4)
        start *= float(stock.pipeline.scheduler.sigmas[0])
    expected = stock(start, scale, num_inference_steps=4)
    sigmas = stock.pipeline.scheduler.sigmas[:4].double()
    with torch.no_grad():
        denoise = conditioned(denoiser, denoiser.encode(PROMPTS, scale))
        images = denoiser.decode(SAMPLERS["ddim"](denoise, start, sigmas, denoise_to_zero=True))
    torch.testing.assert_close(images, expected, **CLOSE)
    assert expected.std() > 0.05  # there is something to be seen


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd3 without T5"])
def test_a_negative_prompt_is_that_of_the_stock_pipeline(name, folder_of):
    stock = Stock(name, folder_of(name))
    stock.family = replace(stock.family, arguments={"negative_prompt": ["a cat"] * 3})
    plain, own = (load(folder_of(name), options=replace(SIZE, negative_prompt=text)) for text in (None, "a cat"))
    x = noise(own)
    level, expected = stock.estimate(x, 4.5, 0.5)
    with torch.no_grad():
        images, without = (
            denoiser.decode(denoiser.denoise(x, level, denoiser.encode(PROMPTS, 4.5))) for denoiser in (own, plain)
        )
    torch.testing.assert_close(images, expected, **CLOSE)
    assert (images - without).abs().max() > 1e-3


def test_one_token_can_stand_for_several_equal_ones():
    """In every block, those of Stable Diffusion 3.5 with an attention of the image alone too, and in the gradients."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=5,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).double()
    first, last, pooled = torch.randn(2, 3, 6).double(), torch.randn(2, 1, 6).double(), torch.randn(2, 5).double()
    x, times = torch.randn(2, 4, 8, 6).double(), torch.tensor([900.0, 20.0]).double()
    found = []
    for copies, processor in ((7, None), (1, SharedTokenAttention(7)), (1, SharedTokenAttention(1))):
        if processor is not None:
            network.set_attn_processor(processor)
        text = torch.cat([first, last.expand(-1, copies, -1)], dim=1).requires_grad_()
        drawn = network(x, text, pooled, times, return_dict=False)[0]
        (gradient,) = torch.autograd.grad(drawn.square().sum(), text)
        found.append((drawn, gradient[:, :3], gradient[:, 3:].sum(1)))
    many, one, unweighted = found
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-8)  # the norms of queries and keys compute in float32
    assert (unweighted[0] - many[0]).abs().max() > 1e-4


@pytest.mark.parametrize(("width", "shared"), [(64, True), (68, False)])
def test_the_zeros_in_the_place_of_t5_are_one_token_for_small_images_alone(width, shared, tmp_path):
    folder = save_tiny_family("sd3", tmp_path, with_t5=False, positions=17)
    denoiser, stock = load(folder, options=ModelOptions(height=64, width=width)), stock_pipeline(folder)
    start, text = noise(denoiser), denoiser.encode(PROMPTS, 4.5)
    kinds = {isinstance(processor, SharedTokenAttention) for processor in denoiser.network.attn_processors.values()}
    assert kinds == {shared}
    assert text.text["encoder_hidden_states"].shape[1] == TOKEN_LIMIT + (1 if shared else T5_TOKENS)
    expected = stock(
        PROMPTS, latents=start, height=64, width=width, guidance_scale=4.5, num_inference_steps=2, output_type="latent"
    ).images
    with torch.no_grad():
        sigmas = stock.scheduler.sigmas[:2].double()
        drawn = SAMPLERS["ddim"](conditioned(denoiser, text), start, sigmas, denoise_to_zero=True)
    torch.testing.assert_close(drawn, expected, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_itself(name, folder_of):
    denoiser = load(folder_of(name))
    kind = {"flux": GuidanceKind.EMBEDDED, "flux without guidance": GuidanceKind.NONE}.get(
        name, GuidanceKind.CLASSIFIER_FREE
    )
    assert denoiser.guidance is kind
    assert denoiser.guidance_of(folder_of(name)) == (kind, denoiser.default_guidance_scale)
    usual = {"sdxl": 5.0, "sdxl, v": 5.0, "flux": 3.5, "flux without guidance": 1.0}
    assert denoiser.default_guidance_scale == denoiser.encode(PROMPTS).guidance_scale == usual.get(name, 7.0)
    assert (denoiser.image_size, denoiser.latent_shape) == ((HEIGHT, WIDTH), (4, HEIGHT // 2, WIDTH // 2))
    time = torch.tensor([denoiser.time_min, 1.0], dtype=torch.float64)
    assert denoiser.sigma_of_time(time).tolist() == pytest.approx([denoiser.sigma_min, denoiser.sigma_max], rel=1e-12)
    assert denoiser.takes_prompts
    assert "sdxl" in name or denoiser.sigma_max == 1.0


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_trajectory_of_a_pixel_ddpm_is_that_of_the_stock_pipeline(prediction_type, clipped, tmp_path):
    """DDIM without noise is Euler's method; where the model's scheduler clips its samples, D is what is clipped."""
    folder = save_tiny_family("ddpm", tmp_path, prediction_type=prediction_type, clip_sample=clipped)
    denoiser = load(folder, options=ModelOptions(height=12, width=8))
    network = UNet2DModel.from_pretrained(folder / "unet")
    scheduler = DDIMScheduler.from_pretrained(
        folder, subfolder="scheduler", timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(4)
    z = torch.randn(3, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    levels = denoiser.sigma_of_time((scheduler.timesteps + 1).double() / 100)
    x = z * (1 + levels[0] ** 2).sqrt().float()
    with torch.no_grad():
        for step in scheduler.timesteps:
            z = scheduler.step(network(z, step).sample, step, z, use_clipped_model_output=True).prev_sample
        denoise = conditioned(denoiser, denoiser.encode([""] * 3))
        ours = SAMPLERS["ddim"](denoise, x, levels, denoise_to_zero=True)
    torch.testing.assert_close(ours, z, **CLOSE)
    assert (ours.abs().max() <= 1.0) == clipped
    torch.testing.assert_close(denoiser.decode(ours), (z / 2 + 0.5).clamp(0, 1), **CLOSE)


def test_a_ddpm_may_lie_flat_as_the_first_ones_do(tmp_path):
    flat, whole = save_flat_ddpm(tmp_path / "flat"), save_tiny_family("ddpm", tmp_path / "whole")
    assert "mid_block.attentions.0.proj_attn.weight" in load_file(flat / "diffusion_pytorch_model.safetensors")
    assert check_assets(str(flat)).image_size == (8, 8)
    ours, expected = (load(folder, options=AS_IT_IS).network.state_dict() for folder in (flat, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    (whole / "config.json").write_text("{}")  # of a training run, say
    load(whole, options=AS_IT_IS)
    (flat / "scheduler_config.json").unlink()
    refused(flat, r"files are missing: \S+flat/scheduler_config\.json\.$")


def test_an_unconditional_model_takes_neither_prompts_nor_guidance(tmp_path):
    denoiser = load(save_tiny_family("ddpm", tmp_path / "cats"), options=AS_IT_IS)
    assert (denoiser.takes_prompts, denoiser.image_size, denoiser.default_guidance_scale) == (False, (8, 8), 1.0)
    denoiser.validate_prompts(["", ""])
    for attempt in (denoiser.validate_prompts, denoiser.encode):
        with pytest.raises(InputError, match=r"^Model cats is unconditional and takes no prompt: leave 'a cat' out\.$"):
            attempt(["", "a cat"])
    with pytest.raises(InputError, match="Model cats has no guidance"):
        denoiser.encode([""], 7.5)
    with pytest.raises(InputError, match="a height of 9 pixels; take a multiple of 2,"):
        load(tmp_path / "cats", options=ModelOptions(height=9))


CLASSES = {"0": "red box, box", "7": "a big cat"}


@pytest.fixture
def dit(tmp_path):
    folder = save_tiny_family("dit", tmp_path)
    edit_json(folder / "model_index.json", id2label=CLASSES)
    return folder


@pytest.mark.parametrize(("scale", "learned_variance"), [(1.0, True), (4.0, True), (4.0, False)])
def test_a_trajectory_of_a_dit_is_that_of_the_stock_pipeline(scale, learned_variance, tmp_path):
    folder = save_tiny_family("dit", tmp_path, learned_variance=learned_variance)
    edit_json(folder / "model_index.json", id2label=CLASSES)
    denoiser, stock = load(folder, options=AS_IT_IS), stock_pipeline(folder)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    expected = stock(
        stock.get_label_ids(["box", "a big cat", "red box"]),
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=4,
        output_type="pt",
    ).images
    levels = denoiser.sigma_of_time((stock.scheduler.timesteps + 1).double() / 1000)
    start = noise(denoiser) * (1 + levels[0] ** 2).sqrt().float()
    with torch.no_grad():
        denoise = conditioned(denoiser, denoiser.encode(["box", "7", "red box"], scale))
        images = denoiser.decode(SAMPLERS["ddim"](denoise, start, levels, denoise_to_zero=True))
    torch.testing.assert_close(images, expected, **CLOSE)
    assert (expected[0] - expected[1]).abs().max() > 0.05
    assert (denoiser.image_size, denoiser.latent_shape, denoiser.default_guidance_scale) == ((16, 16), (4, 8, 8), 4.0)


def test_a_class_that_a_model_does_not_have_is_refused(dit):
    denoiser = load(dit, options=AS_IT_IS)
    denoiser.validate_prompts(["box", "999"])
    for attempt in (denoiser.validate_prompts, denoiser.encode):
        with pytest.raises(InputError, match=r"cannot take:\n  prompt . \('1000'\): it is none of the model's classes"):
            attempt(["box", "1000"])
    with pytest.raises(InputError, match="prompt 1 \\(''\\): it is empty"):
        denoiser.validate_prompts([""])
    with pytest.raises(InputError, match=r"\('blurry'\): it is none of the model's classes"):
        load(dit, options=ModelOptions(negative_prompt="blurry"))
    with pytest.raises(InputError, match=r"a model of the family dit takes no height: leave it out\.$"):
        load(dit, options=ModelOptions(height=32))
    for wrong in ({"1000": "cat"}, {"one": "cat"}, {"1": "cat,"}, ["cat"]):
        edit_json(dit / "model_index.json", id2label=wrong)
        with pytest.raises(InputError, match=r"id2label in model_index\.json must hold names by numbers from 0 to 999"):
            load(dit, options=AS_IT_IS)


# --- guidance


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_each_row_has_its_own_guidance(name, folder_of):
    """At 1 a row costs one row of the network; where guidance is embedded every one does."""
    denoiser = load(folder_of(name), torch.float64)
    x, level = noise(denoiser, 4, torch.float64), torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    scales = torch.tensor([1.0, 4.0, 2.5, 1.0], dtype=torch.float64)
    rows = []

    def counted(_module: nn.Module, inputs: tuple, named: dict, _output: object) -> None:
        rows.append(len(named["hidden_states"] if "hidden_states" in named else inputs[0]))

    handle = denoiser.network.register_forward_hook(counted, with_kwargs=True)
    with torch.no_grad():
        together = denoiser.denoise(x, level, denoiser.encode(PROMPTS[:2]), scales)
        handle.remove()
        alone = [
            denoiser.denoise(x[row : row + 1], level[row], denoiser.encode([PROMPTS[row // 2]], scale))
            for row, scale in enumerate(scales.tolist())
        ]
    assert rows == [4 if name == "flux" else 4 + 2]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        other = denoiser.denoise(x, level, denoiser.encode(PROMPTS[:2]), scales + 1)
    assert all((other - together).abs().flatten(1).amax(1) > 1e-5)


@pytest.mark.parametrize(("name", "rows"), [("sd3", 2), ("flux", 1)])
def test_a_solver_counts_the_rows_that_guidance_takes(name, rows, folder_of):
    denoiser = load(folder_of(name))
    column = EPDTable(torch.full((3, 1), 0.5), torch.ones(3, 1), guidance=torch.full((3, 2), 4.5))
    for solver in (
        classical_solver("ddim", 4, parse_schedule("flowmatch")).guided(4.5),
        Solver("t", "epd", 4, table=column, schedule=parse_schedule("flowmatch")),
    ):
        settled = solver.on(denoiser)
        assert settled.evaluations.rows == rows * settled.evaluations.total
        assert settled.rows_at_once == rows
    assert traits_of(str(folder_of(name))).guidance.kind is denoiser.guidance


def test_guidance_is_refused_where_there_is_none(folder_of):
    unguided = load(folder_of("flux without guidance"))
    text = unguided.encode(PROMPTS)
    for attempt in (
        lambda: unguided.encode(PROMPTS, 3.5),
        lambda: unguided.denoise(noise(unguided), torch.tensor(0.5), text, torch.tensor([1.0, 2.0, 1.0])),
    ):
        with pytest.raises(InputError, match=r"^Model \S+ has no guidance: its guidance scale must be 1 everywhere\.$"):
            attempt()


# --- solvers


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_tables_of_all_columns_work_from_a_noise_level_of_1(name, folder_of):
    denoiser = load(folder_of(name), torch.float64)
    sigmas = get_schedule("flowmatch", 4, denoiser.sigma_min, denoiser.sigma_max, denoiser=denoiser)
    assert sigmas[0] == 1
    x, denoise = noise(denoiser, dtype=torch.float64), conditioned(denoiser, denoiser.encode(PROMPTS))
    history = torch.tensor([[0, 0, 0], [-0.5, 0, 0], [0.1, -0.4, 0]], dtype=torch.float64)
    points = {
        "positions": torch.full((3, 2), 0.5, dtype=torch.float64) * torch.tensor([0.6, 1.4]),
        "weights": torch.full((3, 2), 0.5, dtype=torch.float64),
    }
    with torch.no_grad():
        ipndm = SAMPLERS["ipndm"](denoise, x, sigmas)
        as_table = epd_sampler(denoise, x, sigmas, classical_table("ipndm", sigmas))
        torch.testing.assert_close(as_table, ipndm, rtol=1e-9, atol=1e-9)
        plain = epd_sampler(denoise, x, sigmas, EPDTable(**points, history=history))
        constant = torch.full((3, 3), denoiser.default_guidance_scale, dtype=torch.float64)
        guided = epd_sampler(denoise, x, sigmas, EPDTable(**points, history=history, guidance=constant))
        torch.testing.assert_close(guided, plain, rtol=1e-9, atol=1e-9)
        constant[1, 1] = 1.0
        other = epd_sampler(denoise, x, sigmas, EPDTable(**points, history=history, guidance=constant))
    assert other.isfinite().all()
    assert (other - plain).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_an_estimate_can_be_differentiated_in_x_and_sigma(name, folder_of):
    """As distillation does; at the first noise level, where nothing may divide by what is left."""
    denoiser = load(folder_of(name), torch.float64)
    x, conditioning = noise(denoiser, dtype=torch.float64), denoiser.encode(PROMPTS)
    sigma = torch.full((3,), 1.0, dtype=torch.float64, requires_grad=True)
    value = denoiser.denoise(x, sigma, conditioning).square().sum()
    (gradient,) = torch.autograd.grad(value, sigma)
    step = 5e-5  # the networks bend within a step of their training, and embed the time in float32
    with torch.no_grad():
        ahead, behind = (
            denoiser.denoise(x, sigma + sign * step, conditioning).square().flatten(1).sum(1) for sign in (1, -1)
        )
    torch.testing.assert_close(gradient, (ahead - behind) / (2 * step), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd3 without T5", "flux"])
def test_nothing_in_a_call_waits_for_the_device(name, folder_of):
    """The meta device stands for an accelerator, as it does for Stable Diffusion."""
    denoiser, meta = load(folder_of(name)), torch.device("meta")
    encoded = denoiser.encode(PROMPTS)
    x = noise(denoiser).to(meta)
    denoiser.network.to(meta)
    denoiser.device = meta
    text, without = (
        {key: part.to(meta) for key, part in (of or {}).items()} for of in (encoded.text, encoded.unconditional)
    )
    conditioning = Conditioning(len(PROMPTS), text, without, 4.5)
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with torch.no_grad(), WaitsForTheDevice() as watched:
        estimate = denoiser.denoise(x, torch.tensor(0.5).double(), conditioning, scales)
    assert estimate.shape == (3, *denoiser.latent_shape)
    assert watched.found == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_network_is_one_graph_to_the_compiler(name, folder_of):
    denoiser, calls = load(folder_of(name)), []
    handle = denoiser.network.register_forward_pre_hook(
        lambda _module, inputs, named: calls.append((inputs, named)), with_kwargs=True
    )
    denoiser.denoise(noise(denoiser), torch.tensor(0.5), denoiser.encode(PROMPTS, 1.0))
    handle.remove()
    ((inputs, named),) = calls
    found = torch._dynamo.explain(denoiser.network)(*inputs, **named)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


# --- number types and files


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", torch.float16), ("sd3", torch.float16), ("flux", torch.bfloat16)])
def test_what_overflows_in_half_precision_is_kept_in_float32(name, dtype, folder_of):
    denoiser, exact = load(folder_of(name), dtype), load(folder_of(name))
    assert denoiser.network.dtype == dtype
    assert (denoiser.vae.dtype == torch.float32) == (name == "sdxl")
    for encoder in denoiser.text_encoders:
        widest = {weight.dtype for weight in encoder.module.parameters()}
        assert widest == (
            {dtype, torch.float32} if isinstance(encoder.module, T5EncoderModel) and name == "sd3" else {dtype}
        )
    x, level = noise(denoiser), torch.tensor(0.05, dtype=torch.float64)
    with torch.no_grad():
        estimate, expected = (one.denoise(x, level, one.encode(PROMPTS)) for one in (denoiser, exact))
        assert denoiser.decode(estimate).isfinite().all()
    assert estimate.dtype == torch.float32
    # At a small level D is x and a small correction: were it formed in half precision it would be off by |x| / 256.
    assert (estimate - expected).abs().max() < 0.1 * (expected - x).abs().max()


@pytest.fixture
def copy_of(folder_of, tmp_path):
    """A pipeline's folder that a test may damage."""
    return lambda name: Path(shutil.copytree(folder_of(name), tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_parts_of_a_folder_may_be_stored_in_types_of_their_own(copy_of):
    folder = copy_of("flux")
    for part, dtype in (("transformer", torch.bfloat16), ("text_encoder_2", torch.float16), ("vae", torch.float64)):
        (file,) = (folder / part).glob("*.safetensors")
        stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(stored, file, metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        denoiser = load(folder, dtype)
        parts = (denoiser.network, denoiser.vae, *(encoder.module for encoder in denoiser.text_encoders))
        layers = [layer for part in parts for layer in part.modules() if not isinstance(layer, nn.GroupNorm)]
        assert {weight.dtype for layer in layers for weight in layer.parameters(recurse=False)} == {dtype}
        with torch.no_grad():
            x = noise(denoiser)
            assert denoiser.denoise(x, torch.tensor(0.5), denoiser.encode(PROMPTS)).isfinite().all()


def test_a_prompt_may_be_as_long_as_the_encoder_that_reads_the_whole(folder_of):
    medium, long = " ".join(["cat"] * 40), " ".join(["cat"] * 300)  # 120 and 900 letters, each a token
    with_t5, without = load(folder_of("sd3")), load(folder_of("sd3 without T5"))
    with_t5.validate_prompts([medium])
    assert with_t5.encode([medium]).text["encoder_hidden_states"].shape == (1, TOKEN_LIMIT + 256, 32)
    with pytest.raises(InputError, match="it is 900 tokens long, the text encoder takes 255"):
        with_t5.validate_prompts([long])
    with pytest.raises(InputError, match="it is 120 tokens long, the text encoder takes 22"):
        without.encode([medium])
    with pytest.raises(InputError, match="it is 900 tokens long, the text encoder takes 511"):
        load(folder_of("flux")).encode([long])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_weights_in_several_files_are_fetched_and_loaded(name, folder_of, copy_of, tmp_path):
    """As the large parts are published, beside variants that nobody needs."""
    offered = copy_of(name)
    for part in ("transformer", "text_encoder_2"):
        for file in (offered / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
        getattr(stock_pipeline(folder_of(name)), part).save_pretrained(offered / part, max_shard_size="20KB")
        assert len(list((offered / part).glob("*-of-*.safetensors"))) > 1
    (offered / "flux1-dev.safetensors").touch()
    patterns = contents_of(offered).files()
    for file in offered.rglob("*"):
        name_in = file.relative_to(offered).as_posix()
        if file.is_file() and any(fnmatch.fnmatch(name_in, pattern) for pattern in patterns):
            (tmp_path / "fetched" / name_in).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "fetched" / name_in)
    assert not list((tmp_path / "fetched").rglob("*fp16*"))
    fetched, whole = load(tmp_path / "fetched"), load(folder_of(name))
    for mine, other in ((fetched.network, whole.network), (fetched.text_encoders[1], whole.text_encoders[1])):
        ours, theirs = (getattr(one, "module", one).state_dict() for one in (mine, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_tokenizer_without_a_limit_of_its_own_has_the_encoders(name, copy_of):
    folder = copy_of(name)
    for part in ("tokenizer", "tokenizer_2"):
        edit_json(folder / part / "tokenizer_config.json", model_max_length=10**30)
    denoiser = load(folder)
    assert denoiser.text_encoders[0].limit == TOKEN_LIMIT
    denoiser.encode(PROMPTS)


# --- what is refused


def refused(folder: Path, says: str) -> None:
    """Loading ends in one line that says so."""
    with pytest.raises(InputError, match=says) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_a_network_without_its_text_encoders_is_refused(name, copy_of):
    folder = copy_of(name)
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "text_encoder_2")
    for attempt in (load, lambda folder: check_assets(str(folder))):
        with pytest.raises(
            InputError, match=r"Pipeline that cannot be used here: .*text_encoder, text_encoder_2 are mis"
        ):
            attempt(folder)


def test_t5_is_left_out_where_the_index_leaves_it_out_and_not_where_it_is_lost(copy_of):
    folder = copy_of("sd3")
    shutil.rmtree(folder / "text_encoder_3")
    refused(folder, "the folders text_encoder_3 are missing")
    edit_json(folder / "model_index.json", text_encoder_3=[None, None])
    assert len(load(folder).text_encoders) == 2


@pytest.mark.parametrize(
    ("name", "file", "changes", "says"),
    [
        (
            "sd3",
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            "DDIMScheduler is no flow matching",
        ),
        ("sd3", "scheduler/scheduler_config.json", {"shift": 0.0}, "no usable FlowMatchEuler.* the shift is 0"),
        ("sd3", "scheduler/scheduler_config.json", {"shift": "wide"}, "no usable FlowMatchEuler"),
        ("flux", "scheduler/scheduler_config.json", {"max_image_seq_len": 256}, "no usable FlowMatchEuler"),
        ("flux", "scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ("sdxl", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("sdxl", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type 'sample'"),
        ("sdxl", "unet/config.json", {"time_cond_proj_dim": 8}, "unet"),
        ("sdxl", "tokenizer/tokenizer_config.json", {"model_max_length": 20}, "reads 20 tokens, .* write 24"),
    ],
)
def test_settings_that_cannot_be_used_are_named(copy_of, name, file, changes, says):
    folder = copy_of(name)
    edit_json(folder / file, **changes)
    refused(folder, says)


def test_parts_of_different_models_are_refused(copy_of, folder_of):
    folder = copy_of("sd3")
    shutil.copytree(folder_of("sdxl") / "text_encoder_2", folder / "text_encoder", dirs_exist_ok=True)
    refused(folder, "the network reads 24 numbers of pooled text, and its other parts write 28")
    shutil.copytree(folder_of("flux") / "text_encoder_2", folder / "text_encoder", dirs_exist_ok=True)
    refused(folder, "CLIPTextModelWithProjection")


@pytest.mark.parametrize(
    ("name", "height", "width", "says"),
    [
        ("sdxl", 23, 16, "a height of 23 pixels; take a multiple of 2,"),
        ("sd3", 24, 18, "a width of 18 pixels; take a multiple of 4, at most 32"),
        ("sd3", 36, 16, "a height of 36 pixels; take a multiple of 4, at most 32"),
        ("flux", 24, 18, "a width of 18 pixels; take a multiple of 4,"),
        ("flux", 24, 0, "a width of 0 pixels"),
    ],
)
def test_a_size_that_the_model_cannot_draw_is_refused(folder_of, name, height, width, says):
    with pytest.raises(InputError, match=says):
        load(folder_of(name), options=ModelOptions(height=height, width=width))


# --- what is asked for beside the model


def save_lora(name: str, folder: Path, target: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA of rank 2 on the network and the first text encoder, written by diffusers; and its tensors."""
    pipeline = stock_pipeline(folder)
    network = "unet" if name in ("sd", "sdxl") else "transformer"
    layers = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for part, targets in ((network, ["to_q", "to_v"]), ("text_encoder", ["q_proj", "v_proj"])):
            module = getattr(pipeline, part)
            module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="default")
    type(pipeline).save_lora_weights(target, **layers)
    (file,) = target.glob("*.safetensors")
    return file, load_file(file)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3 without T5", "flux"])
def test_a_lora_is_that_of_the_stock_pipeline(name, folder_of, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "sd") if name == "sd" else folder_of(name)
    file, tensors = save_lora(name, folder, tmp_path / "lora")
    plain, added = (load(folder, options=replace(SIZE, lora=lora)) for lora in (None, f"{file}:0.5"))
    assert added.network.state_dict().keys() == plain.network.state_dict().keys()
    ours = dict(added.network.named_parameters()) | dict(added.text_encoders[0].module.named_parameters())
    changed = 0
    theirs = dict(plain.network.named_parameters()) | dict(plain.text_encoders[0].module.named_parameters())
    for key, weight in theirs.items():
        stem = f".{key.removesuffix('.weight')}.lora_"
        down, up = (
            next((tensor for name, tensor in tensors.items() if stem + letter in name), None) for letter in "AB"
        )
        expected = weight if down is None else weight + 0.5 * up @ down
        changed += down is not None
        torch.testing.assert_close(ours[key], expected, rtol=1e-6, atol=1e-6)
    assert 2 * changed == len(tensors)
    with torch.no_grad():
        x, level = noise(plain), torch.tensor(0.5, dtype=torch.float64)
        estimates = [one.denoise(x, level, one.encode(PROMPTS, 1.0)) for one in (plain, added)]
    assert (estimates[0] - estimates[1]).abs().max() > 1e-3


def test_several_loras_are_added_and_the_files_of_the_model_stay_as_they_are(folder_of, tmp_path):
    before = model_fingerprint(folder_of("flux"))
    file, _ = save_lora("flux", folder_of("flux"), tmp_path / "lora")
    thrice, twice = (
        load(folder_of("flux"), options=replace(SIZE, lora=lora)) for lora in (f"{file}:3", f"{file},{file}:2")
    )
    for name, weight in thrice.network.named_parameters():
        torch.testing.assert_close(twice.network.get_parameter(name), weight, rtol=1e-5, atol=1e-6)
    assert model_fingerprint(folder_of("flux")) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_takes_a_lora_and_stays_as_it_is(suffix, tmp_path):
    """Its tensors are mapped: what is added must not reach the file."""
    folder = save_tiny_pipeline(tmp_path / "sd")
    lora, _ = save_lora("sd", folder, tmp_path / "lora")
    options = ModelOptions(lora=f"{lora}:0.5")
    state = {name: tensor.clone() for name, tensor in compvis_state_dict(*modules_of(load_folder(folder)[1])).items()}
    file = tmp_path / f"model{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    before = file_sha256(file)
    single = assemble_compvis(read_compvis(file), file, folder, options)
    expected = load_folder(folder, options=options)[1]
    for mine, other in zip(modules_of(single), modules_of(expected), strict=True):
        theirs = other.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())
    assert file_sha256(file) == before
    with pytest.raises(InputError, match="a model of the family ldm takes no without_t5"):
        assemble_compvis(read_compvis(file), file, folder, ModelOptions(without_t5=True))


def test_the_vae_of_another_folder_decodes(folder_of, copy_of):
    other = copy_of("sd3")
    (file,) = (other / "vae").glob("*.safetensors")
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    own = load(folder_of("sd3"))
    with torch.no_grad():
        expected = load(other).decode(noise(own))
        for vae in (other, other / "vae"):
            denoiser = load(folder_of("sd3"), options=replace(SIZE, vae=str(vae)))
            assert torch.equal(denoiser.decode(noise(own)), expected)
        assert not torch.equal(own.decode(noise(own)), expected)


def test_options_that_change_an_image_change_the_models_fingerprint(folder_of, tmp_path):
    folder = folder_of("sd3")
    (tmp_path / "a.safetensors").write_bytes(b"a")
    asked = [
        AS_IT_IS,
        ModelOptions(height=24),
        ModelOptions(width=24),
        ModelOptions(negative_prompt="a cat"),
        ModelOptions(without_t5=True),
        ModelOptions(lora=f"{tmp_path}/a.safetensors"),
        ModelOptions(lora=f"{tmp_path}/a.safetensors:0.5"),
        ModelOptions(vae=str(folder / "vae")),
    ]
    assert len({model_fingerprint(folder, options) for options in asked}) == len(asked)
    assert model_fingerprint(folder, ModelOptions(text_on_cpu=True)) == model_fingerprint(folder)
    before = model_fingerprint(folder, asked[5])
    (tmp_path / "a.safetensors").write_bytes(b"b")
    assert model_fingerprint(folder, asked[5]) != before


def test_t5_can_be_left_out(folder_of):
    whole, left_out = (load(folder_of("sd3"), options=replace(SIZE, without_t5=without)) for without in (False, True))
    assert (len(whole.text_encoders), len(left_out.text_encoders)) == (3, 2)
    read, zeros = (one.encode(PROMPTS).text["encoder_hidden_states"] for one in (whole, left_out))
    assert torch.equal(zeros[:, :TOKEN_LIMIT], read[:, :TOKEN_LIMIT])
    assert read[:, TOKEN_LIMIT:].any()
    assert not zeros[:, TOKEN_LIMIT:].any()


def test_text_encoders_can_stay_on_the_cpu(folder_of):
    """The meta device stands for an accelerator."""
    folder, meta = folder_of("flux"), torch.device("meta")
    for on_cpu in (False, True):
        options = replace(SIZE, text_on_cpu=on_cpu)
        denoiser = load_denoiser(folder, device=meta, dtype=torch.float32, options=options)
        assert {encoder.module.device.type for encoder in denoiser.text_encoders} == {"cpu" if on_cpu else "meta"}
        text = denoiser.encode(PROMPTS).text
        assert {part.device for part in (*text.values(), *denoiser.network.parameters())} == {meta}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "ddpm",
            {"lora": "a.safetensors", "vae": "vae"},
            "of the family ddpm takes no lora, vae: leave it out",
        ),
        ("flux", {"negative_prompt": "a cat"}, "a model of the family flux takes no negative_prompt"),
        ("flux", {"without_t5": True}, "a model of the family flux takes no without_t5"),
        ("sd3", {"lora": "none.safetensors"}, "LoRA none.safetensors: there is no such file"),
        ("sd3", {"vae": "none"}, "VAE none: there is no folder with a config.json"),
    ],
)
def test_options_that_a_model_cannot_do_are_refused(folder_of, tmp_path, name, options, says):
    folder = save_tiny_family("ddpm", tmp_path) if name == "ddpm" else folder_of(name)
    for attempt in (load, lambda folder, options: check_assets(str(folder), options)):
        with pytest.raises(InputError, match=says) as error:
            attempt(folder, options=ModelOptions(**options))
        assert "\n" not in str(error.value)


def test_a_lora_of_another_model_is_refused(folder_of, tmp_path):
    file, tensors = save_lora("sdxl", folder_of("sdxl"), tmp_path / "lora")
    for name in ("sd3", "flux"):
        with pytest.raises(InputError, match=r"is no LoRA for this \w+Pipeline: ") as error:
            load(folder_of(name), options=replace(SIZE, lora=str(file)))
        assert "\n" not in str(error.value)
    save_file({**tensors, "unet.nowhere.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match="is no LoRA for this"):
        load(folder_of("sdxl"), options=replace(SIZE, lora=str(tmp_path / "more.safetensors")))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut off"):
        load(folder_of("sdxl"), options=replace(SIZE, lora=str(file)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora": "weights.bin"}, "LoRA 'weights.bin': name a .safetensors file"),
        ({"lora": "a.safetensors:inf"}, "a finite scale"),
        ({"lora": "a.safetensors:much"}, "name a .safetensors file"),
        ({"lora": "a.safetensors,"}, "LoRA '': name"),
        ({"negative_prompt": "  "}, "it is empty"),
        ({"negative_prompt": "a\0"}, "NUL"),
    ],
)
def test_options_that_are_none_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        ModelOptions(**options)


def test_options_are_read_back_from_what_they_change():
    asked = ModelOptions(
        lora="C:/a.safetensors:-0.5", height=24, negative_prompt="x", without_t5=True, text_on_cpu=True
    )
    assert asked.loras() == [(Path("C:/a.safetensors"), -0.5)]
    assert ModelOptions(lora="C:/a.safetensors").loras() == [(Path("C:/a.safetensors"), 1.0)]
    assert ModelOptions.from_changes(asked.changes(), "x.json: model_options") == replace(asked, text_on_cpu=False)
    assert AS_IT_IS.changes() == {}
    for told in ([], {"height": "24"}, {"size": 3}, {"height": True}, {"without_t5": 1}):
        with pytest.raises(InputError, match=r"^x\.json: model_options is .* no options of a model$"):
            ModelOptions.from_changes(told, "x.json: model_options")
