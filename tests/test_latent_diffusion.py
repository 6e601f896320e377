"""The Stable Diffusion denoiser against diffusers' and transformers' own modules, and against its own algebra."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTokenizer

from errors import InputError
from models import devices, load_denoiser
from models.backbone import frozen
from models.denoiser import Conditioning
from models.families.stable_diffusion import StableDiffusion
from models.options import ModelOptions
from models.pipelines import load_folder
from models.recent import RecentTensors
from schedules import get_schedule
from solvers import EPDSteps, EPDTable, epd_sampler
from tests import golden
from tests.tiny_pipeline import TEXT_WIDTH, TOKEN_LIMIT, modules_of, save_tiny_pipeline

PROMPTS = ["red box", "a big cat"]
HIDDEN = "encoder_hidden_states"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def denoiser(folder) -> StableDiffusion:
    return load_denoiser(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(folder) -> StableDiffusion:
    return load_denoiser(folder, device="cpu", dtype=torch.float64)


def noise(count: int, sigma: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return sigma * torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class LinearNetwork(nn.Module):
    """The golden file's own network, eps = c * z + 0.001 * c_noise, which remembers what it was asked."""

    def forward(
        self, z: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        assert not return_dict
        self.z, self.timestep = z, timestep
        return (encoder_hidden_states[:, :, :, None] * z + 0.001 * timestep[:, None, None, None],)


@pytest.mark.parametrize(("scale", "name"), [(1.0, "D_g1"), (7.5, "D_g7p5")])
def test_estimate_and_network_inputs_agree_with_the_reference(folder, scale, name):
    def reference(key):
        return golden.tensor("schedules", f"f64__sd15_{key}")

    text, without = reference("fwd_cond")[:, None, None], reference("fwd_uncond")[:, None, None]
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float64)
    denoiser.network = LinearNetwork()
    x, sigma = reference("fwd_x"), reference("grid_sigma")
    # The reference's unconditional text differs from row to row, so each row is asked alone.
    rows = []
    for row in range(len(x)):
        prompt, unconditional = ({"encoder_hidden_states": part[row : row + 1]} for part in (text, without))
        conditioning = Conditioning(1, prompt, unconditional, scale)
        rows.append(denoiser.denoise(x[row : row + 1], sigma[row], conditioning))
        torch.testing.assert_close(denoiser.network.z[0], reference("model_input")[row], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(denoiser.network.timestep[0], reference("c_noise")[row], rtol=1e-8, atol=1e-9)
        c_in = denoiser.network.z[0].flatten()[0] / x[row].flatten()[0]
        torch.testing.assert_close(c_in, reference("c_in")[row], rtol=1e-10, atol=0.0)
    torch.testing.assert_close(torch.cat(rows), reference(name), rtol=1e-9, atol=1e-10)


def test_too_little_memory_is_said_before_it_runs_out(folder, monkeypatch):
    weights = [weight for module in modules_of(load_folder(folder)[1]) for weight in module.parameters()]
    # In float32, as in the files, only the convolutions' kernels change their layout; in float64 all is new.
    kernels = sum(4 * weight.numel() for weight in weights if weight.ndim == 4 and weight.shape[2:] != (1, 1))
    for dtype, needed in ((torch.float32, kernels), (torch.float64, 8 * sum(weight.numel() for weight in weights))):
        monkeypatch.setattr(devices, "free_memory", lambda _, free=needed: free)
        load_denoiser(folder, device="cpu", dtype=dtype)
        monkeypatch.setattr(devices, "free_memory", lambda _, free=needed - 1: free)
        with pytest.raises(InputError, match=r"needs 0\.0 GB of memory on cpu, 0\.0 GB are free: .*bfloat16"):
            load_denoiser(folder, device="cpu", dtype=dtype)


def test_properties_come_from_the_files(denoiser):
    assert denoiser.latent_shape == (4, 8, 8)
    assert denoiser.image_size == (16, 16)
    assert [encoder.limit for encoder in denoiser.text_encoders] == [TOKEN_LIMIT]
    assert denoiser.time_min == 0.001
    assert denoiser.sigma_max == pytest.approx(14.6146, abs=1e-4)
    assert float(denoiser.sigma_of_time(torch.tensor(denoiser.time_min))) == pytest.approx(denoiser.sigma_min, rel=1e-6)
    modules = (denoiser.network, denoiser.vae, denoiser.text_encoders[0].module)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(module.training for module in modules)


def test_denoise_agrees_with_the_modules_fed_by_hand(folder, exact):
    step, scale = 500, 3.0
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").double()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").double()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer([*PROMPTS, "", ""], padding="max_length", max_length=TOKEN_LIMIT, return_tensors="pt").input_ids
    alpha_squared = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[step]
    sigma = ((1 - alpha_squared) / alpha_squared).sqrt()
    x = noise(2, float(sigma))
    with torch.no_grad():
        text = text_encoder(ids).last_hidden_state
        z = (x * alpha_squared.sqrt()).repeat(2, 1, 1, 1)
        with_text, without = unet(z, torch.tensor(step), text).sample.chunk(2)
        expected = x - sigma * (without + scale * (with_text - without))
        ours = exact.denoise(x, sigma, exact.encode(PROMPTS, scale))
    # 1e-5: the network's own embedding of the step is in float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_whole_sampling_agrees_with_the_diffusers_pipeline(tmp_path, prediction_type):
    """Euler's method in sigma is DDIM: four steps of the pipeline, text and guidance and decoding included."""
    folder = save_tiny_pipeline(tmp_path / "v1.5", prediction_type=prediction_type)
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32)
    assert denoiser.name == "v1.5"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    steps = torch.tensor([999, 749, 499, 249, 0], dtype=torch.float64)
    sigmas = denoiser.sigma_of_time((steps + 1) / 1000)
    x = noise(2, float(sigmas[0]), torch.float32)
    latents = x / (1 + float(sigmas[0]) ** 2) ** 0.5
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=7.5, latents=latents, height=16, width=16, output_type="pt"
    ).images
    with torch.no_grad():
        conditioning = denoiser.encode(PROMPTS)
        for sigma, following in pairwise(sigmas):
            slope = (x - denoiser.denoise(x, sigma, conditioning)) / sigma
            x = (x + (following - sigma) * slope).float()
        # The pipeline decodes its latents in the model's own scaling.
        ours = denoiser.decode(x / (1 + sigmas[-1].float() ** 2).sqrt())
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)


def test_guidance_is_the_line_through_both_predictions(exact):
    x, sigma = noise(2, 3.0), torch.tensor(3.0, dtype=torch.float64)
    with_text = exact.denoise(x, sigma, exact.encode(PROMPTS, 1.0))
    without = exact.denoise(x, sigma, exact.encode(["", ""], 1.0))
    guided = exact.denoise(x, sigma, exact.encode(PROMPTS, 4.0))
    assert (with_text - without).abs().max() > 1e-4
    torch.testing.assert_close(guided, without + 4.0 * (with_text - without), rtol=1e-9, atol=1e-9)


def test_each_row_has_its_own_guidance_and_costs_one_row_of_the_network_at_1(exact):
    x, sigma = noise(4, 3.0), torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    scales = torch.tensor([1.0, 4.0, 2.5, 1.0], dtype=torch.float64)
    rows = []
    handle = exact.network.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    together = exact.denoise(x, sigma, exact.encode(PROMPTS), scales)
    handle.remove()
    assert rows == [4 + 2]
    for row, scale in enumerate(scales.tolist()):
        alone = exact.denoise(x[row : row + 1], sigma[row], exact.encode([PROMPTS[row // 2]], scale))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)


def test_a_negative_prompt_takes_the_unconditional_place(folder, exact):
    x, sigma = noise(1, 3.0), torch.tensor(3.0, dtype=torch.float64)
    options = ModelOptions(negative_prompt="cat")
    told = load_denoiser(folder, device="cpu", dtype=torch.float64, options=options)
    negated = told.denoise(x, sigma, told.encode(["red box"], 0.0))
    torch.testing.assert_close(negated, exact.denoise(x, sigma, exact.encode(["cat"], 1.0)), rtol=1e-9, atol=1e-9)


def test_k_points_in_one_call_equal_k_calls(exact):
    """Sample-major rows, each with its own noise level."""
    points, conditioning = 3, exact.encode(PROMPTS)
    x = noise(2 * points, 5.0).reshape(2, points, 4, 8, 8)
    sigma = torch.tensor([[0.1, 1.0, 7.0], [0.5, 2.0, 14.0]], dtype=torch.float64)
    together = exact.denoise(x.flatten(0, 1), sigma.flatten(), conditioning).unflatten(0, (2, points))
    for point in range(points):
        alone = exact.denoise(x[:, point], sigma[:, point], conditioning)
        torch.testing.assert_close(together[:, point], alone, rtol=1e-9, atol=1e-9)


def test_text_rows_are_made_once_for_each_count(denoiser):
    conditioning = denoiser.encode(PROMPTS)
    rows = conditioning.rows(6, unconditional=4)
    assert conditioning.rows(6, unconditional=4) is rows
    assert conditioning.rows(6) is not rows
    first, second = conditioning.text[HIDDEN]
    assert torch.equal(rows[HIDDEN][4:], torch.stack([first, first, first, second, second, second]))
    assert torch.equal(rows[HIDDEN][:4], conditioning.unconditional[HIDDEN].expand(4, -1, -1))
    assert len(conditioning.rows(6)[HIDDEN]) == 6


@pytest.mark.parametrize("count", [0, 3])
def test_latents_that_cannot_be_shared_out_are_an_error(denoiser, count):
    with pytest.raises(ValueError, match="no multiple"):
        denoiser.denoise(noise(count, 1.0), torch.tensor(1.0), denoiser.encode(PROMPTS))


def test_each_prompt_is_encoded_once(folder):
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32)
    calls = []
    denoiser.text_encoders[0].module.register_forward_hook(lambda _module, arguments, _output: calls.append(arguments))
    first = denoiser.encode(["red", "blue", "red"])
    again = denoiser.encode(["blue", "red"])
    assert len(calls) == 3  # red, blue, and the empty prompt
    assert torch.equal(again.text[HIDDEN], first.text[HIDDEN][[1, 0]])


def test_the_tensors_longest_unused_are_forgotten():
    recent = RecentTensors(most_bytes=12)
    a, _, c = (recent.keep(text, torch.zeros(1)) for text in "abc")
    assert recent.get("a") is a
    recent.keep("d", {"of": torch.zeros(1)})
    assert [recent.get(text) for text in "abc"] == [a, None, c]
    assert recent.num_bytes == 12
    whole = recent.keep("e", torch.zeros(4))  # more than there is room for
    assert whole.shape == (4,)
    assert (recent.get("e"), recent.num_bytes) == (None, 0)


def test_however_many_prompts_are_encoded_little_memory_is_kept(folder, monkeypatch):
    monkeypatch.setattr("models.latent_diffusion.CACHED_BYTES", 20_000)
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32)
    first = denoiser.encode(["red"], 1.0).text[HIDDEN]
    for number in range(100):
        denoiser.encode([f"red {number}"], 1.0)
    size = first.nbytes
    assert 20_000 - size < denoiser._texts.num_bytes <= 20_000
    assert torch.equal(denoiser.encode(["red"], 1.0).text[HIDDEN], first)


def test_v_prediction_and_epsilon_prediction_of_one_network_agree(tmp_path, exact):
    """If v = alpha eps - sigma_z x0 is what the network says, both give the same x0 (arXiv 2202.00512, section 4)."""
    folder = save_tiny_pipeline(tmp_path, prediction_type="v_prediction")
    v_model = load_denoiser(folder, device="cpu", dtype=torch.float64)
    x, sigma = noise(2, 3.0), torch.tensor(3.0, dtype=torch.float64)
    alpha = 1 / (1 + sigma**2).sqrt()
    # The two folders hold the same weights: the raw output v is read off the epsilon model.
    v = (x - exact.denoise(x, sigma, exact.encode(PROMPTS))) / sigma
    z = alpha * x
    epsilon = alpha * v + sigma * alpha * z
    x0 = (z - sigma * alpha * epsilon) / alpha
    ours = v_model.denoise(x, sigma, v_model.encode(PROMPTS))
    torch.testing.assert_close(ours, x0, rtol=1e-9, atol=1e-9)


def test_estimate_can_be_differentiated_in_x_and_sigma(exact):
    """Distillation follows the loss through the network; checked by finite differences in one direction."""
    conditioning = exact.encode(["red box"])
    x = noise(1, 3.0).requires_grad_()
    sigma = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    probe = noise(1, 1.0, seed=1)
    value = (exact.denoise(x, sigma, conditioning) * probe).sum()
    along_x, along_sigma = torch.autograd.grad(value, (x, sigma))
    step = 3e-4  # no smaller: the network embeds the time in float32
    with torch.no_grad():

        def difference(x_step: Tensor | float, sigma_step: float) -> Tensor:
            ahead, behind = (
                (exact.denoise(x + sign * x_step, sigma + sign * sigma_step, conditioning) * probe).sum()
                for sign in (1, -1)
            )
            return (ahead - behind) / (2 * step)

        assert float(along_sigma) == pytest.approx(float(difference(0.0, step)), rel=2e-2)
        direction = noise(1, 1.0, seed=2)
        assert float((along_x * direction).sum()) == pytest.approx(float(difference(step * direction, 0.0)), rel=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_decoding_in_chunks_equals_the_vae_on_the_whole(folder, denoiser, chunk_size):
    latents = noise(5, 1.0, torch.float32)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        images = denoiser.decode(latents, chunk_size)
        expected = (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, expected, rtol=0.0, atol=1e-5)


def test_what_does_not_decode_to_numbers_is_nan_and_no_colour(denoiser, monkeypatch):
    answers = torch.zeros(4, 3, 16, 16)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        answers[row, 0, 3, 3] = value
    monkeypatch.setattr(denoiser.vae, "decode", lambda latents, **_: (answers,))
    images = denoiser.decode(torch.zeros(4, 4, 8, 8))
    assert images.isfinite().flatten(1).all(1).tolist() == [False, False, False, True]
    assert images[:3, 0, 3, 3].isnan().all()


def test_low_precision_weights_leave_the_estimate_in_the_type_of_x(folder):
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.bfloat16)
    x, sigma = noise(2, 0.05, torch.float32), torch.tensor(0.05, dtype=torch.float64)
    with torch.no_grad():
        estimate = denoiser.denoise(x, sigma, denoiser.encode(PROMPTS))
    assert estimate.dtype == torch.float32
    # At a small level D is x and a small correction: were it formed in bfloat16 it would be off by |x| / 256.
    in_full = load_denoiser(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = in_full.denoise(x, sigma, in_full.encode(PROMPTS))
    correction = (expected - x).abs().max()
    assert (estimate - expected).abs().max() < 0.1 * correction


def test_bad_prompts_are_all_listed_with_their_reasons(denoiser):
    denoiser.validate_prompts(PROMPTS)
    long = "abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(InputError) as error:
        denoiser.validate_prompts(["red box", "  ", long, "a \udcff b", "a\0", "..."])
    message = str(error.value)
    assert "prompt 2" in message
    assert "empty" in message
    assert "prompt 3" in message
    assert "26 tokens" in message
    assert "22" in message
    assert "prompt 4 ('a \\udcff b'): it holds bytes that are not UTF-8" in message
    assert "prompt 5 ('a\\x00'): it holds a NUL character" in message
    assert "prompt 6 ('...'): it holds no letter, digit or symbol" in message
    assert "prompt 1" not in message
    with pytest.raises(InputError, match="26 tokens"):
        denoiser.encode([long])


def test_words_the_model_was_not_taught_are_named(folder):
    def unknown_words(prompt: str) -> list[str]:
        return [word for word in prompt.split() if word not in ("red", "box")]

    family, parts = load_folder(folder)
    taught = {"unknown_words": unknown_words, "captions": "known.csv"}
    denoiser = family("taught", parts, device=torch.device("cpu"), dtype=torch.float32, **taught)
    denoiser.validate_prompts(["red box"])
    with pytest.raises(InputError, match=r"mauve, sofa; captions that it reads are in known\.csv"):
        denoiser.validate_prompts(["mauve sofa"])


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_guidance_scale_that_is_no_scale_is_refused(denoiser, scale):
    with pytest.raises(InputError, match="guidance scale"):
        denoiser.encode(PROMPTS, scale)


def test_no_prompts_and_no_chunk_are_refused(denoiser):
    with pytest.raises(InputError, match="No prompts"):
        denoiser.encode([])
    with pytest.raises(ValueError, match="chunk_size"):
        denoiser.decode(noise(1, 1.0), chunk_size=0)


def test_the_text_width_is_that_of_the_files(denoiser):
    assert denoiser.encode(PROMPTS).text[HIDDEN].shape == (2, TOKEN_LIMIT, TEXT_WIDTH)


@pytest.mark.parametrize("layout", ["contiguous", "compiled"])
def test_what_makes_it_faster_changes_no_estimate(folder, exact, layout):
    other = load_denoiser(folder, device="cpu", dtype=torch.float64)
    if layout == "compiled":
        other.compile_network(backend="eager")
    else:
        convolution = exact.network.conv_out.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last)
        assert not convolution.is_contiguous()
        nn.Module.to(other.network, memory_format=torch.contiguous_format)
        nn.Module.to(other.vae, memory_format=torch.contiguous_format)
        assert other.network.conv_out.weight.is_contiguous()
    x, sigma = noise(4, 3.0), torch.tensor(3.0, dtype=torch.float64)
    estimates = [model.denoise(x, sigma, model.encode(PROMPTS)) for model in (other, exact)]
    torch.testing.assert_close(*estimates, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.decode(x), exact.decode(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "computed_in"), [(16, torch.float32), (32, torch.bfloat16)])
def test_on_a_cpu_group_norms_of_small_images_are_computed_in_float32(side, computed_in):
    exact = nn.Sequential(nn.GroupNorm(2, 8))
    nn.init.normal_(exact[0].weight)
    x = 5 + torch.randn(2, 8, side, side).bfloat16()
    expected = exact(x.float())
    layer = frozen(exact, torch.device("cpu"), torch.bfloat16)
    seen = []
    layer[0].register_forward_hook(lambda _, given, computed: seen.append((given[0].dtype, computed.dtype)))
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.01, atol=0.02)
    assert seen == [(computed_in, torch.bfloat16)]


class CountsFusedAttention(TorchFunctionMode):
    """Counts the calls of torch's own attention, which has one kernel for all of it on a GPU."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def test_all_attention_is_fused(folder):
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32)
    with CountsFusedAttention() as in_text:
        conditioning = denoiser.encode(PROMPTS[:1], 1.0)
    with CountsFusedAttention() as in_network:
        denoiser.denoise(noise(1, 1.0), torch.tensor(1.0), conditioning)
    with CountsFusedAttention() as in_decoder:
        denoiser.decode(noise(1, 1.0))
    layers = [
        sum(isinstance(part, Attention) for part in half.modules()) for half in (denoiser.network, denoiser.vae.decoder)
    ]
    texts = 2  # the prompt, and the empty one of the unconditional half
    assert in_text.count == texts * denoiser.text_encoders[0].module.config.num_hidden_layers
    assert [in_network.count, in_decoder.count] == layers
    assert min(layers) > 0


def test_the_network_is_one_graph_to_the_compiler(denoiser):
    """Of fixed shapes, without a step that the host would have to look into: what a CUDA graph needs."""
    x, text = torch.zeros(2, *denoiser.latent_shape), denoiser.encode(PROMPTS[:2], 1.0).text
    found = torch._dynamo.explain(denoiser.network)(x.to(denoiser.dtype), torch.ones(2), **text, return_dict=False)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_a_network_is_compiled_once_however_many_rows_come(folder, exact):
    """What is more than the rows that it was compiled for goes in parts, what is fewer is filled up."""
    torch._dynamo.reset()
    denoiser, graphs, rows = load_denoiser(folder, device="cpu", dtype=torch.float64), [], []

    def compiler(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    denoiser.compile_network([4], backend=compiler)
    denoiser.network.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    scales = torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0, 1.0])
    with torch.no_grad():
        for count, guidance in ((2, None), (6, None), (2, 1.0), (6, scales), (4, None)):
            column = guidance if isinstance(guidance, Tensor) else None
            scale = guidance if column is None else None
            x, level = noise(count, 3.0), torch.tensor(3.0, dtype=torch.float64)
            # As strided as a network in channels_last answers.
            x = x.to(memory_format=torch.channels_last) if count == 4 else x
            estimates = [one.denoise(x, level, one.encode(PROMPTS, scale), column) for one in (denoiser, exact)]
            torch.testing.assert_close(*estimates, rtol=0, atol=1e-10)
    assert rows == [4] * (1 + 3 + 1 + 3 + 2)
    assert len(graphs) == 1


def test_the_fewest_rows_that_hold_a_call_are_taken(folder):
    denoiser, rows = load_denoiser(folder, device="cpu", dtype=torch.float32), []
    denoiser.compile_network({8, 2}, backend="eager")
    denoiser.network.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    conditioning = denoiser.encode(["red"], 1.0)
    for count in (1, 2, 3, 10):
        denoiser.denoise(noise(count, 1.0), torch.tensor(1.0), conditioning)
    assert rows == [2, 2, 8, 8, 2]


def test_compiled_code_is_kept_in_a_folder_that_can_be_named(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    denoiser = load_denoiser(folder, device="cpu", dtype=torch.float32)
    for told, kept in ((None, str(tmp_path / "outputs" / "compiled")), ("/else", "/else")):
        if told:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", told)
        denoiser.compile_network(backend="eager")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == kept
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", kept)  # so that it is taken away again


def test_texts_in_batches_are_encoded_alike_whoever_is_with_them(folder):
    """As on CUDA: always as many at once, the last ones filled up."""
    alone = load_denoiser(folder, device="cpu", dtype=torch.float32)
    one, other = (load_denoiser(folder, device="cpu", dtype=torch.float32) for _ in range(2))
    one._texts_at_once = other._texts_at_once = 4
    read: list[int] = []
    one.text_encoders[0].module.register_forward_pre_hook(lambda _module, inputs: read.append(len(inputs[0])))
    prompts = ["red", "a big cat", "red box", "blue", "a dog"]
    together = one.encode(prompts, 1.0).text[HIDDEN]
    assert read == [4, 4, 4]  # the empty prompt too
    reordered = torch.cat([other.encode([prompt], 1.0).text[HIDDEN] for prompt in reversed(prompts)]).flip(0)
    assert torch.equal(together, reordered)
    torch.testing.assert_close(together, alone.encode(prompts, 1.0).text[HIDDEN], rtol=0, atol=1e-5)


def test_no_layer_of_the_decoder_holds_more_than_can_be_counted(folder, monkeypatch):
    denoiser, decoded = load_denoiser(folder, device="cpu", dtype=torch.float32), []
    assert denoiser._decodable == (2**31 - 1) // (16 * 16 * 16)
    denoiser._decodable = 2
    plain = denoiser.vae.decode
    monkeypatch.setattr(
        denoiser.vae, "decode", lambda z, **told: decoded.append(len(z)) or plain(z, **told), raising=True
    )
    denoiser.decode(noise(5, 1.0, torch.float32), 4)
    assert decoded == [2, 2, 1]


class WaitsForTheDevice(TorchDispatchMode):
    """Takes note of copies from the host to the meta device that the host would wait for on a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            there = kwargs.get("device", args[0].device)
            if args[0].device.type == "cpu" and there.type == "meta" and not kwargs.get("non_blocking"):
                self.found.append(f"{list(args[0].shape)} {args[0].dtype}")
        return function(*args, **kwargs)


def through_the_loop(
    denoiser: StableDiffusion, device: torch.device, watch: Callable[[], object], *, batched: bool = False
) -> Tensor:
    """Images [2, 3, 16, 16] of a table on `device`; `watch` is called inside the first call of the network."""
    table = EPDTable(torch.tensor([[0.3, 0.6], [0.4, 0.8]]), torch.tensor([[0.5, 0.5], [0.6, 0.4]]))
    sigmas = get_schedule("discrete", 3, denoiser.sigma_min, denoiser.sigma_max, denoiser=denoiser)
    encoded = denoiser.encode(PROMPTS)
    text, without = (
        {name: part.to(device) for name, part in of.items()} for of in (encoded.text, encoded.unconditional)
    )
    conditioning = Conditioning(len(PROMPTS), text, without, 7.5)
    calls = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if not calls:  # what is brought over once may be waited for
            denoiser.denoise(x, sigma, conditioning)
            denoiser.denoise(x, sigma.to(device).expand(len(x)), conditioning)
            watch()
        calls.append(x.device.type)
        return denoiser.denoise(x, sigma, conditioning)

    with torch.no_grad():
        x = torch.ones(2, 4, 8, 8, device=device)
        images = denoiser.decode(epd_sampler(denoise, x, sigmas, table.expand(2) if batched else table), 1)
    assert calls == [device.type] * 4
    return images


@pytest.mark.parametrize("batched", [False, True])
def test_nothing_in_the_solver_loop_waits_for_the_device(folder, batched):
    """The meta device stands for an accelerator: whoever asks it for a value fails there."""
    denoiser, meta = load_denoiser(folder, device="cpu", dtype=torch.float32), torch.device("meta")
    denoiser.encode([*PROMPTS, ""])
    for module in (denoiser.network, denoiser.vae):
        module.to(meta)
    denoiser.device = meta
    with ExitStack() as stack:
        mode = WaitsForTheDevice()
        images = through_the_loop(denoiser, meta, lambda: stack.enter_context(mode), batched=batched)
        assert images.shape == (2, 3, 16, 16)
        assert mode.found == []
        torch.ones(2).to(meta)
        assert mode.found == ["[2] torch.float32"]  # it would have been seen


def test_a_batch_is_begun_while_the_device_works_at_the_one_before():
    table = EPDTable(
        torch.tensor([[0.3, 0.6], [0.4, 0.8]]),
        torch.tensor([[0.5, 0.5], [0.6, 0.4]]),
        scale_time=torch.tensor([[1.0, 1.1], [0.9, 1.0]]),
        history=torch.tensor([[0.0, 0.0], [0.1, 0.0]]),
    ).expand(2)
    x = torch.ones(2, 4, 8, 8, device="meta")
    with WaitsForTheDevice() as mode:
        levels = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.5, 1.0]], dtype=torch.float64)
        steps = EPDSteps(lambda x, _sigma: x / 2, table, levels, x)
        for interval in range(len(steps)):
            x = steps.interval(interval, x)
    assert mode.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_too_nothing_in_the_solver_loop_waits(folder):
    device = torch.device("cuda")
    denoiser = load_denoiser(folder, device=device, dtype=torch.float16)
    try:
        images = through_the_loop(denoiser, device, lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = load_denoiser(folder, device="cpu", dtype=torch.float32)
    expected = through_the_loop(exact, torch.device("cpu"), lambda: None)
    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=2e-2)
