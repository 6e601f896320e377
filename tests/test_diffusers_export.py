"""A solver's file as a folder for diffusers: the same latents, in a process that knows nothing of this repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

from errors import InputError
from integrations.diffusers.scheduling_epd import EPDScheduler
from models import load_denoiser
from models.generate import conditioned, decode, initial_noise
from models.noise_levels import NoiseLevels
from models.registry import pipeline_of
from scripts.export_diffusers import main
from solvers import epd_sampler
from tests.hub import running_hub
from tests.test_diffusers_scheduler import CPU, OPTIONAL, PROMPTS, SEEDS, SIGMAS, played, with_columns
from tests.tiny_families import save_tiny_family, stock_pipeline
from tests.tiny_pipeline import save_tiny_pipeline
from training.diffusers_export import SOLVER_FILE, lines_for_diffusers, scheduler_of, write_diffusers
from training.snapshot import save_snapshot
from training.solver import Schedule, Solver, classical_solver, load_solver

DISCRETE = {"schedule_type": "discrete", "schedule_rho": 1.0, "guidance_rate": 4.0}
FILES = ["README.md", SOLVER_FILE, "pipeline.py", "pipeline_epd.py", "scheduler_config.json", "scheduling_epd.py"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny"), prediction_type="v_prediction")


def exported(folder: Path, table: Any, metadata: dict[str, Any], model: Path) -> Any:
    """The solver of a file, settled for the model, with its export in `folder`; and the model."""
    solver = load_solver(save_snapshot(folder / "network-snapshot-000001", table, metadata))
    denoiser = load_denoiser(model, device=CPU, dtype=torch.float64)
    paths = write_diffusers(folder / "diffusers", solver, denoiser, str(model))
    assert sorted(path.name for path in paths) == FILES
    return solver.on(denoiser), denoiser


@pytest.mark.parametrize(
    ("table", "metadata"),
    [
        (with_columns(2, "scale_dir", "scale_time"), DISCRETE),
        (with_columns(2, *OPTIONAL), {"schedule_type": "polynomial", "schedule_rho": 5.0}),
        (with_columns(0, "history"), {"sigmas": SIGMAS.tolist(), "guidance_rate": 2.0}),
        (with_columns(0, "guidance"), {"sigmas": SIGMAS.tolist()}),
        (with_columns(3), {"schedule_type": "logsnr", "sigma_min": 0.1, "sigma_max": 10.0}),
    ],
    ids=["scales", "all columns", "no points, own levels", "guidance", "the model's guidance"],
)
def test_an_exported_solver_draws_what_its_file_draws(
    tmp_path: Path, model: Path, table: Any, metadata: dict[str, Any]
) -> None:
    solver, denoiser = exported(tmp_path, table, metadata, model)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    latents = played(pipe, EPDScheduler.from_pretrained(tmp_path / "diffusers"))
    ours = solver.latents(denoiser, PROMPTS, SEEDS, dtype=torch.float64)
    torch.testing.assert_close(latents, ours, rtol=1e-5, atol=1e-5)


def run_code(code: str, folder: Path, **environment: str) -> str:
    """The output of code in a process of its own that does not find this repository."""
    (folder / "used.py").write_text(code)
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    process = subprocess.run(
        [sys.executable, "used.py"],
        cwd=folder,
        env={**inherited, "HF_HOME": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_the_model_cards_code_runs_in_a_folder_of_its_own(tmp_path: Path, model: Path) -> None:
    """That for the pipeline and that for the scheduler, each with nothing of the other's names."""
    solver, denoiser = exported(tmp_path, with_columns(2, *OPTIONAL), DISCRETE, model)
    folder = tmp_path / "diffusers"
    codes = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    torch.save(initial_noise(SEEDS, (4, 8, 8), device=CPU, dtype=torch.float32), folder / "noise.pt")
    whole = "import os, sys, torch\n"
    for number, (code, arguments) in enumerate(
        zip(codes, ("", "**pipe.scheduler.pipeline_arguments(), "), strict=True)
    ):
        assert len([line for line in code.splitlines() if line]) <= 8
        whole += (
            f"names = {{}}\nexec({code!r}, names)\npipe = names['pipe']\nos.remove('image.png')\n"
            f"latents = pipe({PROMPTS}, {arguments}latents=torch.load('noise.pt'), output_type='latent').images\n"
            f"torch.save(latents, 'latents{number}.pt')\n"
        )
    output = run_code(
        f"{whole}print({{'solvers', 'models', 'training', 'integrations'}} & sys.modules.keys())\n",
        folder,
        HF_HUB_OFFLINE="1",
    )
    assert output.splitlines()[-1] == "set()"
    ours = solver.latents(denoiser, PROMPTS, SEEDS, dtype=torch.float64)
    for number in range(2):
        torch.testing.assert_close(torch.load(folder / f"latents{number}.pt").double(), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("table", [with_columns(0, "history"), with_columns(2, *OPTIONAL)], ids=["no points", "all"])
@pytest.mark.parametrize(("family", "prompt", "subject"), [("dit", "7", {"class_labels": [7]}), ("ddpm", "", {})])
def test_pipelines_that_leave_the_scaling_out_draw_what_the_sampler_draws(
    tmp_path: Path, family: str, prompt: str, subject: dict[str, Any], table: Any
) -> None:
    """They start at the noise itself, and hand on to the scheduler what the network was asked."""
    clipped = {"clip_sample": True, "clip_sample_range": 2.0} if family == "ddpm" else {}
    denoiser = load_denoiser(save_tiny_family(family, tmp_path, **clipped), device=CPU, dtype=torch.float64)
    if family == "ddpm":
        table = replace(table, guidance=None)
    solver = Solver("epd", "epd", table.num_steps, table=table, sigmas=SIGMAS, guidance_scale=None)
    pipe = stock_pipeline(tmp_path).to(dtype=torch.float64)
    pipe.scheduler = scheduler_of(solver, denoiser)
    drawn = pipe(
        **subject,
        **pipe.scheduler.pipeline_arguments(),
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    noise = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = noise * (1 + SIGMAS[0] ** 2).sqrt()
    with torch.no_grad():
        latents = epd_sampler(conditioned(denoiser, denoiser.encode([prompt])), start, SIGMAS, table)
    ours = decode(denoiser, latents).images.permute(0, 2, 3, 1)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.02
    torch.testing.assert_close(torch.tensor(drawn).float(), ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_card_of_a_model_without_prompts_calls_it_with_what_it_takes(tmp_path: Path) -> None:
    whole = "import os\n"
    for family, called in (("dit", "class_labels=[0], "), ("ddpm", "")):
        model, folder = save_tiny_family(family, tmp_path / family), tmp_path / f"solver of {family}"
        denoiser = load_denoiser(model, device=CPU, dtype=torch.float32)
        metadata = {"schedule_type": "polynomial", "schedule_rho": 5.0}
        solver = load_solver(save_snapshot(tmp_path / "solver", with_columns(2), metadata))
        write_diffusers(folder, solver, denoiser, str(model))
        [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert f"pipe({called}**pipe.scheduler.pipeline_arguments())" in code
        shown = lines_for_diffusers(str(folder), str(model), family)
        whole += f"os.chdir({str(folder)!r})\n" + "".join(
            f"exec({text!r}, {{}})\nos.rename('image.png', 'drawn by {number}.png')\n"
            for number, text in enumerate((code, shown))
        )
    run_code(whole, tmp_path, HF_HUB_OFFLINE="1")
    assert len(list(tmp_path.glob("*/drawn by *.png"))) == 4


@pytest.mark.slow
def test_an_export_is_used_from_a_hub_by_its_name(tmp_path: Path, model: Path) -> None:
    exported(tmp_path, with_columns(2), DISCRETE, model)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "diffusers" / "README.md").read_text(), re.DOTALL)[1]
    with running_hub() as hub:
        for file in (tmp_path / "diffusers").iterdir():
            hub.keep("owner/name", file.name, file.read_bytes())
        (tmp_path / "empty").mkdir()
        named = code.replace('solver = "."', 'solver = "owner/name"')
        run_code(named, tmp_path / "empty", HF_ENDPOINT=hub.address)
    assert (tmp_path / "empty" / "image.png").stat().st_size > 0


def test_the_model_card_says_what_the_solver_costs_and_what_was_measured(tmp_path: Path, model: Path) -> None:
    denoiser = load_denoiser(model, device=CPU, dtype=torch.float32)
    table = with_columns(2, "guidance")
    table.guidance[:] = torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 1.0], [2.5, 2.5, 2.5]])
    solver = load_solver(save_snapshot(tmp_path / "solver", table, {"sigmas": SIGMAS.tolist()}))
    heldout = {"reward": 0.8, "reward_start": 0.75, "reward_difference": 0.05}
    heldout |= {"reward_difference_low": 0.03, "reward_difference_high": 0.0701, "dropped": 0}
    heldout = {f"heldout/{name}": value for name, value in heldout.items()}
    write_diffusers(tmp_path / "one", solver, denoiser, "owner/model", heldout)
    card = (tmp_path / "one" / "README.md").read_text()
    for line in (
        "base_model: owner/model",
        "| base model | [owner/model](https://huggingface.co/owner/model) |",
        "# A solver of 3 intervals for model",
        "| network evaluations of an image, one after another | 6 |",
        "| network evaluations of an image, in all | 9 |",
        "| network rows of an image: an evaluation under guidance has two | 15 |",  # 9, and 6 with guidance
        "| guidance | a scale for each evaluation, 1 to 3 |",
        "| noise levels | 14.6, 3, 0.8, 0.1 |",
        "| reward | 0.7500 | 0.8000 | +0.0500 [+0.0300, +0.0701] |",
    ):
        assert line in card.splitlines()
    assert "| on held-out prompts | start of the tuning | this solver | difference, 95% interval |" in card
    write_diffusers(tmp_path / "two", solver, denoiser, str(model))
    card = (tmp_path / "two" / "README.md").read_text()
    assert "Nothing was measured." in card
    assert "base_model" not in card  # which is a repository's name


def test_a_family_without_a_pipeline_of_ours_has_the_scheduler_alone(tmp_path: Path, model: Path) -> None:
    denoiser = load_denoiser(model, device=CPU, dtype=torch.float32)
    denoiser.backend = "flux"
    solver = load_solver(save_snapshot(tmp_path / "solver", with_columns(2), DISCRETE))
    paths = write_diffusers(tmp_path, solver, denoiser, "owner/model")
    assert sorted(path.name for path in paths) == [name for name in FILES if name != "pipeline.py"]
    assert "custom_pipeline" not in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ the command line


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_the_folder(tmp_path: Path, model: Path) -> None:
    file = save_snapshot(tmp_path / "solver", with_columns(1), {**DISCRETE, "model_path": str(model)})
    result = run(file, "--outdir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(Path(line).name for line in result.output.splitlines()) == FILES
    assert f'"{model}", custom_pipeline=solver' in (tmp_path / "out" / "README.md").read_text()
    assert run(file, "--outdir", tmp_path / "out", "--base", "owner/name").exit_code == 0
    assert '"owner/name", custom_pipeline=solver' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({"schedule_type": "discrete"}, [], "does not say its dataset_name; name the model with --model_path"),
        ({**DISCRETE, "afs": True, "model_path": "MODEL"}, [], "cannot be played by diffusers: afs"),
        ({"model_path": "MODEL"}, [], "does not say its schedule_type"),
        (DISCRETE, ["--model_path", "FILE"], "is a single file; name the pipeline that diffusers shall load"),
    ],
)
def test_refuses_in_a_line(
    tmp_path: Path, model: Path, metadata: dict[str, Any], options: list[str], message: str
) -> None:
    places = {"MODEL": str(model), "FILE": str(tmp_path / "model.safetensors")}
    Path(places["FILE"]).touch()
    metadata = {key: places.get(value, value) for key, value in metadata.items()}
    file = save_snapshot(tmp_path / "solver", with_columns(1), metadata)
    result = run(file, "--outdir", tmp_path / "out", *(places.get(option, option) for option in options))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_classical_sampler_is_no_table() -> None:
    solver = classical_solver("heun", 4, Schedule("discrete", 1.0))
    with pytest.raises(InputError, match="heun: is no table"):
        write_diffusers(Path("unused"), solver, load_denoiser("shapes", device=CPU, dtype=torch.float32), "shapes")


def test_diffusers_loads_registered_models_by_their_pipelines() -> None:
    assert pipeline_of("sd15") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert Path(pipeline_of("shapes"), "model_index.json").is_file()
    assert pipeline_of("owner/name") == "owner/name"


def test_noise_levels_are_exported_as_they_were_read(model: Path) -> None:
    denoiser = load_denoiser(model, device=CPU, dtype=torch.float32)
    assert denoiser.scheduler_config == {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
    }
    betas = [0.001, 0.01, 0.02]
    stored = NoiseLevels.from_scheduler_config({"trained_betas": betas, "beta_schedule": "linear"}, "test")
    assert stored.config == {"num_train_timesteps": 3, "trained_betas": betas}
