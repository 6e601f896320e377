"""From a run to the table that anyone can load: `python -m training.ppo.export_epd_predictor exps/<run>`."""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from errors import InputError, shows_input_errors
from files import write_atomically
from models.devices import resolve_device
from models.fingerprints import file_sha256
from models.registry import load_denoiser, pipeline_of
from solvers import EPDTable
from training.diffusers_export import write_diffusers
from training.ppo.assembly import Start, from_plain, guidance_scale, policy_of
from training.ppo.checkpoint import largest_difference, load_checkpoint, require_equal, table_to_plain
from training.ppo.config import SNAPSHOT_KEYS, build_config, model_options
from training.ppo.reward_names import reward_name
from training.runs.checkpoint import best_path, fitting, newest_checkpoint, step_path
from training.runs.configuration import to_plain
from training.runs.run_folder import RunFolder, read_metrics
from training.snapshot import GRID, load_snapshot, private_parts, save_snapshot
from training.solver import MODEL_OPTIONS, NETWORK_DTYPE, RANGE_KEYS, Solver, load_solver

SNAPSHOT_TOLERANCE = 1e-6
"""How far the numbers read back from a .pkl may be from the exported ones: it holds float32 parameters."""
DIFFUSERS = "diffusers"
"""The folder in a run's export/ that the diffusers library plays."""


@dataclass(frozen=True)
class Export:
    """A solver on its way out, and what it was made from; `sigmas` [S + 1] where its noise levels were trained."""

    table: EPDTable
    sigmas: Tensor | None
    start: Start
    step: int
    checkpoint: Path
    config_hash: str


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A path, also relative to the run: checkpoints/policy-step000050.pt. [the one with the largest step]",
)
@click.option("--best", is_flag=True, help="The checkpoint with the best held-out reward.")
@click.option("--device", default="cpu", help="Where the policy's mean is computed: cpu or cuda.")
@click.option("--no-manifest", is_flag=True, help="Leave out export-manifest-*.json.")
@click.option("--base", help="What diffusers loads the model by, in diffusers/: a folder, or OWNER/NAME. [the run's]")
@click.option("--no-diffusers", is_flag=True, help="Leave out diffusers/, for which the model is loaded.")
@shows_input_errors
def main(
    run: Path, checkpoint: Path | None, best: bool, device: str, no_manifest: bool, base: str | None, no_diffusers: bool
) -> None:
    """Write the mean table of a RUN's policy as a predictor snapshot into RUN/export.

    RUN/export/diffusers plays it in the diffusers library, anywhere; its README.md says how, and scripts.push_to_hub
    shows it to others.

    \b
    python -m training.ppo.export_epd_predictor exps/<timestamp>-shapes
    python sample.py --predictor_path exps/<timestamp>-shapes --prompt "a large red circle" --seeds 0-3
    """
    folder = RunFolder.open(run)
    export = read_export(_chosen(folder, checkpoint, best=best), torch.device(resolve_device(device)))
    paths = write_export(folder, export, manifest=not no_manifest)
    for path in paths:
        click.echo(path)
    if private := private_parts(export.table, snapshot_metadata(export)):
        click.echo(f"no .pkl for the public EPD code, which has no place for {', '.join(private)}")
    if not no_diffusers:
        try:
            click.echo(export_for_diffusers(folder, load_solver(paths[0]), export, base))
        except InputError as error:  # the table is worth having without
            click.echo(f"{folder.export / DIFFUSERS} is not written: {error}")


def read_export(checkpoint: Path, device: torch.device) -> Export:
    """The mean of a checkpoint's policy.

    Raises:
        InputError: the checkpoint cannot be read, the device has no float64, or or see `policy_of`.
    """
    if device.type == "mps":
        raise InputError("--device mps: the policy needs float64, which this device lacks; use cpu")
    state = load_checkpoint(checkpoint)
    with fitting(checkpoint):
        start = from_plain(state["start"], build_config(state["config"], str(checkpoint)).config, checkpoint)
        policy = policy_of(start, state, checkpoint, device)
    return Export(*policy.mean(), start, state["step"], checkpoint, state["config_hash"])


def write_export(folder: RunFolder, export: Export, *, manifest: bool) -> list[Path]:
    """Write the snapshot, its training options and its manifest; returns the paths.

    The snapshot is a .json, and a .pkl where the public code base has a place for all that the solver is made of.

    Raises:
        InputError: the files would not read back to the same table (then none is written), or cannot be written.
    """
    name, suffix = f"network-snapshot-export-step{export.step:06d}.pkl", f"step{export.step:06d}.json"
    with tempfile.TemporaryDirectory() as trial:
        difference = _read_back(Path(trial) / name, export)
    pickled = save_snapshot(folder.export / name, export.table, snapshot_metadata(export))
    options = folder.export / f"training_options-export-{suffix}"
    config = to_plain(export.start.config)
    _write_json(options, {"predictor": load_snapshot(pickled)[1], "config": config})
    paths = [*dict.fromkeys([pickled, pickled.with_suffix(".json")]), options]
    if manifest:
        described = _manifest(folder, export, paths, difference)
        paths.append(folder.export / f"export-manifest-{suffix}")
        _write_json(paths[-1], described)
    return paths


def export_for_diffusers(folder: RunFolder, solver: Solver, export: Export, base: str | None = None) -> Path:
    """Write the exported solver as a folder that diffusers plays, with what the run measured at its step; its path.

    `base` is what diffusers loads the model by, where not by the name or path that the run has.

    Raises:
        InputError: the model cannot be loaded, diffusers cannot play the solver, or the files cannot be written.
    """
    named = base or pipeline_of(solver.model)
    denoiser = load_denoiser(solver.model, device="cpu", dtype=torch.float32, options=solver.model_options)
    heldout, config = _heldout(folder, export.step), export.start.config
    judges = {"reward": config.reward.weights_path, "panel": config.logging.panel}
    listed = ", ".join(f"{judge} {reward_name(path)}" for judge, path in judges.items() if path)
    chosen = ", which the step was chosen by" if export.checkpoint == best_path(folder.checkpoints) else ""
    measured_on = f"{config.logging.eval_count} held-out prompts ({listed}){chosen}"
    return write_diffusers(folder.export / DIFFUSERS, solver, denoiser, named, heldout, measured_on)[0].parent


def snapshot_metadata(export: Export) -> dict[str, Any]:
    """The starting snapshot's metadata with the settings that the table was tuned for."""
    model = export.start.config.model
    settled = {name: getattr(model, name) for name in SNAPSHOT_KEYS}
    named: dict[str, Any] = {"model_path": model.model_path} if model.model_path else {}
    if model.backend:
        named["backend"] = model.backend
    if changes := model_options(export.start.config).changes():
        named[MODEL_OPTIONS] = changes
    if model.dtype != "float32" or NETWORK_DTYPE in export.start.snapshot.origin.metadata:
        named[NETWORK_DTYPE] = model.dtype
    guidance = {"guidance_rate": None if export.table.guidance is not None else guidance_scale(export.start.config)}
    own: dict[str, Any] = {}
    snapshot, tuned = export.start.snapshot, export.start.solver
    if (snapshot.sigma_range, snapshot.flow_shift) != (tuned.sigma_range, tuned.flow_shift):  # of another schedule
        own |= dict.fromkeys(RANGE_KEYS & snapshot.origin.metadata.keys())
    if export.sigmas is not None:
        own |= {GRID: export.sigmas.tolist(), "schedule_type": None, "schedule_rho": None}
    elif model.schedule_type is not None:
        own |= {GRID: None}  # levels that a schedule took the place of
    return {**snapshot.origin.metadata, **settled, **named, **guidance, **own}


def _chosen(folder: RunFolder, checkpoint: Path | None, *, best: bool) -> Path:
    if best and checkpoint is not None:
        raise InputError("--best and --checkpoint both name a checkpoint: give one of them")
    if checkpoint is not None:
        if not checkpoint.exists() and (folder.path / checkpoint).exists():
            checkpoint = folder.path / checkpoint
        if checkpoint.resolve().parent.parent != folder.path.resolve():
            raise InputError(
                f"--checkpoint {checkpoint}: is no checkpoint of {folder.path}; name the run that it is of"
            )
        return checkpoint
    if not best:
        return newest_checkpoint(folder.checkpoints)
    return _best(folder)


def _best(folder: RunFolder) -> Path:
    """The best checkpoint; that of its step, where a resume from an earlier step has put it aside."""
    file = best_path(folder.checkpoints)
    if file.exists():
        return file
    newest = newest_checkpoint(folder.checkpoints)
    state = load_checkpoint(newest)
    with fitting(newest):
        step = operator.index((state["watch"] or {"best_step": 0})["best_step"])
    numbered = step_path(folder.checkpoints, step)
    if step and numbered.exists():
        return numbered
    why = (
        f"the best checkpoint, of step {step}, was replaced by that of a later step before the run was resumed"
        if step
        else "no evaluation has beaten the starting table on the held-out prompts (or logging.eval_interval is 0), so "
        "there is no best checkpoint"
    )
    raise InputError(f"{folder.path}: {why}: export the newest by leaving --best out")


def _read_back(path: Path, export: Export) -> float | None:
    """Write the snapshot, read each of its files by itself, and hold them against the solver.

    Returns the largest difference of the .pkl, None where there is none.
    """
    written, expected = save_snapshot(path, export.table, snapshot_metadata(export)), table_to_plain(export.table)
    exact, metadata = load_snapshot(written)
    require_equal(table_to_plain(exact), expected, 0.0, f"{export.checkpoint}: the exported .json")
    if export.sigmas is not None and metadata[GRID] != export.sigmas.tolist():
        raise InputError(f"{export.checkpoint}: the exported .json has other noise levels, so it is not used")
    if written.suffix == ".json":
        return None
    written.with_suffix(".json").unlink()
    rounded = table_to_plain(load_snapshot(written)[0])
    require_equal(rounded, expected, SNAPSHOT_TOLERANCE, f"{export.checkpoint}: the exported .pkl")
    return largest_difference(expected, rounded)


def _manifest(folder: RunFolder, export: Export, paths: list[Path], difference: float | None) -> dict[str, Any]:
    origin = export.start.snapshot.origin
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": folder.path.name,
        "step": export.step,
        "checkpoint": {"file": export.checkpoint.name, "sha256": file_sha256(export.checkpoint)},
        "config_sha256": export.config_hash,
        "start": {"file": str(origin.file), "sha256": origin.sha256, "notes": list(export.start.notes)},
        "files": {path.name: file_sha256(path) for path in paths},
        "largest_difference_of_pkl": difference,
        "heldout": _heldout(folder, export.step),
    }


def _heldout(folder: RunFolder, step: int) -> dict[str, float]:
    """What the held-out evaluation of a step measured; empty where it had none."""
    rows = [row for row in read_metrics(folder.metrics) if row["step"] == step and "heldout/reward" in row]
    return {name: value for row in rows for name, value in row.items() if name.startswith("heldout/")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
