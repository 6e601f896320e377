"""From a checked configuration to the objects of a run; before that, whether all that they need is there."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from errors import InputError
from models.denoiser import Denoiser
from models.devices import DTYPES, check_compiler, resolve_device
from models.fingerprints import fingerprint, model_fingerprint
from models.prompts import read_prompts
from models.registry import SHAPES_WORLD, check_assets, default_guidance_scale, load_denoiser, traits_of
from models.shapes.scenes import parse
from solvers import EPDSteps, EPDTable
from training.measuring.evaluation import LIBRARIES, SAMPLING_CODE, Store
from training.parameters import GRID, PARTS
from training.ppo.checkpoint import require_equal, table_from_plain, table_to_plain
from training.ppo.cold_start import ColdStart, prepare_table, trainable
from training.ppo.config import Config, apply_snapshot, group_size, model_options, model_spec, with_usual
from training.ppo.heldout import HeldoutJudge, HeldoutWatch, Kept
from training.ppo.panels import (
    VerifierPanel,
    require_readable,
    require_verifiable,
    reward_fingerprint,
    verifier_fingerprint,
)
from training.ppo.rewards import Reward, build_reward, find_reward_files, load_reward
from training.ppo.rewards.batched import Scoring
from training.ppo.rl_runner import RLRunner, Shard
from training.ppo.rollout import PromptStream
from training.ppo.search import Policy, Search, method_called
from training.runs.command_line import started_processes
from training.runs.configuration import LoadedConfig
from training.runs.fabric import fabric_of
from training.snapshot import is_plain
from training.solver import Origin, Schedule, Solver, load_solver, solver_of

log = logging.getLogger(__name__)

COCO_PROMPTS = "MS-COCO_val2014_30k_captions.csv"
FETCH_COCO = f"Fetch {COCO_PROMPTS} (some 2 MB):  python -m models.assets fetch coco-prompts"
MAKE_ONE = "Predictors are distilled by train.py; with --init-only it writes an undistilled one to start from."
POLICY_TOLERANCE = 1e-9
"""How far a policy's mean may be from the table in its checkpoint: both are float64, made on two devices at worst."""
VERIFIER = "verifier"
TRY_NOW = (
    "To try things now, with what comes in the repository:  "
    "python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml"
)


@dataclass(frozen=True)
class Start:
    """What a run starts from: its final configuration, the table, and what the reader should be told about both.

    Attributes:
        config: nothing that the solver needs is null.
        snapshot: the solver as its file says it.
        solver: the one that the run samples: the snapshot's with the configuration's settings, and its table as the
            policy needs it. Its noise levels are settled once a model is loaded (`build`), and in a checkpoint.
        notes: one line for each thing that was overridden or put in order.
    """

    config: Config
    snapshot: Solver
    solver: Solver
    notes: tuple[str, ...]

    @property
    def table(self) -> EPDTable:
        """The table that the policy begins at."""
        return self.solver.table


@dataclass(frozen=True)
class Parts:
    """The objects of a run; `judge` and `watch` are None where held-out evaluation is off.

    `start` is what the run was built from, its solver settled for the model.
    """

    start: Start
    denoiser: Denoiser
    trainer: Search
    judge: HeldoutJudge | None
    watch: HeldoutWatch | None


def prepare(loaded: LoadedConfig) -> Start:
    """Read the predictor, settle the configuration by it, and look for every file and device that a run needs.

    No model is loaded.

    Raises:
        InputError: lists all that is missing (with its size and the command that fetches it, where that is known) or
            contradicts the predictor.
    """
    config, faults = with_usual(loaded.config), []
    try:
        start = start_from_snapshot(loaded)
        config = start.config
    except InputError as error:
        faults.append(f"data.predictor_snapshot={config.data.predictor_snapshot}: {error}")
    refuse([*faults, *path_faults(config, None if faults else start)], config)
    return start


def require_processes(config: Config) -> None:
    """Raise InputError where other processes were started than the configuration says: each would make the same run."""
    run, (number, launcher) = config.run, started_processes()
    if number in (1, run.num_devices * run.num_nodes):
        return
    nodes = number // int(os.environ.get("LOCAL_WORLD_SIZE", number)) or 1
    raise InputError(
        f"{launcher} started {number} processes, and run.num_devices={run.num_devices} with run.num_nodes="
        f"{run.num_nodes} asks for {run.num_devices * run.num_nodes}: "
        f"set --override run.num_devices={number // nodes} run.num_nodes={nodes}"
    )


def refuse(faults: Sequence[str], config: Config) -> None:
    """Raise one `InputError` that lists the faults, if there are any, and what can be run without the missing files."""
    if faults:
        listed = "\n".join("  - " + fault.replace("\n", "\n    ") for fault in faults)
        instead = "" if model_spec(config) in SHAPES_WORLD else f"\n{TRY_NOW}"
        raise InputError(f"the run cannot start:\n{listed}{instead}")


def start_from_snapshot(loaded: LoadedConfig) -> Start:
    """Read the predictor and settle the configuration by it; a guidance that neither names is the model's own.

    Raises:
        InputError: there is no such predictor, or it and the configuration contradict each other.
    """
    try:
        snapshot = load_solver(loaded.config.data.predictor_snapshot, guidance=loaded.config.model.guidance_rate)
    except InputError as error:
        raise InputError(f"{error}\n{MAKE_ONE}") from None
    config, notes = apply_snapshot(loaded, snapshot)
    if guidance_scale(config) is None and not snapshot.has_guidance_column:
        own = default_guidance_scale(model_spec(config))
        config = replace(config, model=replace(config.model, guidance_type="cfg", guidance_rate=own))
        notes.append(f"guidance {own:g}, the model's own: neither {snapshot.where} nor the configuration names one")
    notes += _idle(config)
    cold_start = _cold_start(snapshot.table, config)
    config = _with_population(config, cold_start.table)
    return Start(config, snapshot, _settled(snapshot, config, cold_start.table), (*notes, *cold_start.repairs))


def _idle(config: Config) -> list[str]:
    """A line for each term of PPO's loss that is asked of another search."""
    method, ppo = config.search.method, config.ppo
    asked = {"kl_coef": ppo.kl_coef, "entropy_coef": ppo.entropy_coef} if method != "ppo" else {}
    return [
        f"ppo.{key}={value:g} does nothing: search.method={method} has no such term"
        for key, value in asked.items()
        if value
    ]


def _settled(snapshot: Solver, config: Config, table: EPDTable) -> Solver:
    """The snapshot's solver with the settings of a configuration in which nothing that it needs is null."""
    model = config.model
    if model.schedule_type is not None:  # otherwise it goes by noise levels of its own
        snapshot = snapshot.on_schedule(Schedule(model.schedule_type, model.schedule_rho))
    return replace(
        snapshot,
        table=table,
        guidance_scale=None if table.guidance is not None else guidance_scale(config),
        model=model_spec(config),
    )


def _cold_start(table: EPDTable, config: Config) -> ColdStart:
    """The table that the policy begins at."""
    if "guidance" in config.ppo.train and config.model.guidance_type == "uncond":
        raise InputError(
            "ppo.train names guidance, and model.guidance_type=uncond is without any: leave one of them out"
        )
    return prepare_table(table, config.ppo.train, guidance_scale=guidance_scale(config))


def _with_population(config: Config, table: EPDTable) -> Config:
    """The configuration with the population of CMA-ES that null stands for.

    That is the largest divisor of a step's images that is at most CMA-ES's own default, 4 + 3 log n for n parameters.
    """
    search, images = config.search, config.ppo.rollout_batch_size
    if search.method != "cma_es" or search.population is not None:
        return config
    names = trainable(table, config.ppo.train)
    parameters = sum(PARTS[name].free(table.num_intervals, table.num_points) for name in names)
    usual = 4 + int(3 * math.log(parameters))
    population = max(size for size in range(1, usual + 1) if images % size == 0)
    if population < 2:
        raise InputError(
            f"ppo.rollout_batch_size={images} images cannot be shared out among 2 to {usual} candidates, of which each "
            f"needs as many: set it to a multiple of search.population"
        )
    return replace(config, search=replace(search, population=population))


def to_plain(start: Start) -> dict[str, Any]:
    """What a checkpoint keeps of it, so that a resumed run needs no snapshot file."""
    origin = start.snapshot.origin
    return {
        "file": str(origin.file),
        "sha256": origin.sha256,
        "metadata": dict(origin.metadata),
        "snapshot_table": table_to_plain(start.snapshot.table),
        "table": table_to_plain(start.table, start.solver.sigmas),
        "notes": list(start.notes),
    }


def from_plain(state: Mapping[str, Any], config: Config, checkpoint: Path) -> Start:
    """The inverse of `to_plain`, under a configuration that is settled already; to be called in `fitting`.

    Raises InputError where the table to start from is not that of the snapshot.
    """
    if not is_plain(state["metadata"]):
        raise ValueError("the start's metadata is not plain")
    origin = Origin(Path(state["file"]), str(state["sha256"]), dict(state["metadata"]))
    snapshot = solver_of(table_from_plain(state["snapshot_table"]), origin)
    table, sigmas = table_from_plain(state["table"]), state["table"].get(GRID)
    prepared = table_to_plain(_cold_start(snapshot.table, config).table)
    require_equal(prepared, table_to_plain(table), POLICY_TOLERANCE, f"{checkpoint}: the snapshot")
    solver = _settled(snapshot, config, table)
    if sigmas is not None:
        solver = replace(solver, sigmas=sigmas)
        EPDSteps(torch.zeros_like, table, sigmas, torch.zeros(1, 1))  # whether they are a grid for the table
    return Start(config, snapshot, solver, tuple(map(str, state["notes"])))


def guidance_scale(config: Config) -> float | None:
    """The scale of classifier-free guidance, 1 for none."""
    return 1.0 if config.model.guidance_type == "uncond" else config.model.guidance_rate


def cost_lines(start: Start) -> list[str]:
    """The arithmetic of a run, one fact a line; looks into the model's files, if they are there, and loads none."""
    config, solver = start.config, start.solver
    with suppress(InputError):  # a dry run says the costs of a model that is still to be fetched
        solver = replace(solver, guidance_kind=traits_of(model_spec(config)).guidance.kind)
    parallel, total, rows = solver.evaluations
    model, ppo, images = config.model, config.ppo, config.ppo.rollout_batch_size
    prompts = images // group_size(config)
    # First evaluations that a prompt's images have in common are asked once.
    spared = (images - prompts) * solver.first_rows if ppo.shared_noise else 0
    alike = f", {spared} of them spared where a prompt's images begin alike" if spared else ""
    guided = "" if rows == total else ", twice for guidance" if rows == 2 * total else ", some twice for guidance"
    updates = ppo.ppo_epochs * -(-images // ppo.minibatch_size)
    passes = f"passes {ppo.ppo_epochs}, minibatches of {ppo.minibatch_size} images"
    watch = config.logging
    watched = (
        f"{watch.eval_count} images every {watch.eval_interval} steps, and before step 1 those of the start and of "
        "classical solvers"
    )
    return [
        f"num_steps {model.num_steps} ({model.num_steps - 1} intervals), num_points {model.num_points}",
        f"{parallel} network calls an image one after another, {rows} network rows ({total} evaluations{guided})",
        f"{images} images a step: {prompts} prompts x {group_size(config)} tables",
        f"{images * rows} network rows a step{alike}",
        *{
            "ppo": [f"{updates} update{'s' if updates > 1 else ''} a step: {passes}"],
            "cma_es": [],
            "reward_gradient": ["every network row again, and backwards, for the gradient: about four times the work"],
        }[config.search.method],
        f"{ppo.steps} steps, {ppo.steps * images} images in all",
        *([f"held out: {watched}"] if watch.eval_interval else []),
    ]


def path_faults(config: Config, start: Start | None = None) -> Iterator[str]:
    """What is wrong with the files and devices that a configuration names, one message each; reads no model's weights.

    Prompts and panel are held against the model, and so is the solver of `start`, where there is one.
    """
    watch, spec, denoiser = config.logging, model_spec(config), None
    yield from _fault(f"run.output_root={config.run.output_root}", _check_writable, Path(config.run.output_root))
    yield from _fault(f"run.device={config.run.device}", resolve_device, config.run.device)
    yield from _fault(f"search.method={config.search.method}", method_called, config.search.method)
    if spec is not None:
        try:
            denoiser = check_assets(spec, model_options(config))
        except InputError as error:
            yield f"model {spec}: {error}"
    if config.data.prompt_csv is not None:
        yield from _fault(f"data.prompt_csv={config.data.prompt_csv}", _training_prompts, config, denoiser)
    if start is not None and denoiser is not None:
        yield from _fault(f"model {spec}", start.solver.on, denoiser)
    if config.model.compile:
        yield from _fault("model.compile=true", lambda: check_compiler(resolve_device(config.run.device)))
    for path in (config.reward.weights_path, *config.reward.mix):
        yield from _fault(f"reward {path}", find_reward_files, path, config.reward.cache_dir)
    if watch.eval_interval:
        yield from _fault(f"logging.eval_prompts={watch.eval_prompts}", _heldout_prompts, config, denoiser)
        yield from _fault(f"logging.panel={watch.panel}", _check_panel, config, denoiser)


def _fault(name: str, check: Callable[..., object], *arguments: object) -> Iterator[str]:
    """The message of a check that fails, with the name of what is checked."""
    try:
        check(*arguments)
    except InputError as error:
        yield f"{name}: {error}"


def _check_panel(config: Config, denoiser: Denoiser | None) -> None:
    """Raise InputError where the panel's files are missing, or it cannot judge what the model draws."""
    panel = config.logging.panel
    if panel == VERIFIER:
        file = config.logging.eval_prompts
        prompts = [] if file is None else read_prompts(file)[: config.logging.eval_count]
        try:
            for prompt in prompts:
                parse(prompt)
            if denoiser is not None:
                require_readable(denoiser, [VERIFIER])
                require_verifiable(denoiser)
        except InputError as error:
            raise InputError(
                f"{error}. The verifier judges the shapes world alone: for another model set logging.panel=null, or "
                "name a reward that is not trained on"
            ) from None
    elif panel is not None:
        find_reward_files(panel, config.reward.cache_dir)


def build(start: Start, fabric: Fabric) -> Parts:
    """Load the models and put a run together.

    Args:
        start: what `prepare` or a checkpoint gave.
        fabric: launched.

    Raises:
        InputError: an asset cannot be used, or a prompt not be encoded.
    """
    config = start.config
    denoiser = _load_model(config, fabric.device)
    start = replace(start, solver=start.solver.on(denoiser))
    prompts = _training_prompts(config, denoiser)
    reward = build_reward(
        {config.reward.weights_path: 1.0, **config.reward.mix},
        tokenizer_folder=config.reward.cache_dir,
        **_scoring(config, fabric.device),
    )
    require_readable(denoiser, reward.readers())
    ppo = config.ppo
    runner = RLRunner(
        denoiser,
        start.solver,
        reward,
        group_size=group_size(config),
        shared_noise=ppo.shared_noise,
        seed=config.run.seed,
        max_rows=ppo.max_rows,
        decode_chunk_size=ppo.decode_chunk_size,
        shard=_shard(fabric),
    )
    if config.model.compile:
        runner.compile_network(ppo.rollout_batch_size // runner.shard.count)
    stream = PromptStream(prompts, shuffle=config.data.shuffle, seed=config.run.seed)
    trainer = method_called(config.search.method).make_search(make_policy(start), runner, stream, config)
    heldout = _heldout_prompts(config, denoiser) if config.logging.eval_interval else []
    if fabric.is_global_zero:
        reward.say_what_is_cut([*prompts, *heldout])
    if not heldout:
        return Parts(start, denoiser, trainer, None, None)
    judge = _judge(start, denoiser, runner, heldout, says=fabric.is_global_zero)
    return Parts(start, denoiser, trainer, judge, HeldoutWatch(reward))


def _judge(start: Start, denoiser: Denoiser, runner: RLRunner, prompts: list[str], *, says: bool) -> HeldoutJudge:
    """Of the held-out prompts; `says` what its panel cuts off."""
    watch, panel = start.config.logging, _panel(start.config, denoiser)
    if panel is not None:
        require_readable(denoiser, [panel.name] if panel.reads_prompts else [])
        if says:
            panel.say_what_is_cut(prompts)
    return HeldoutJudge(
        runner,
        panel,
        prompts,
        first_seed=watch.eval_seed,
        preview_count=watch.preview_prompts,
        kept=Kept(Store(Path(watch.cache), log.warning), _described(start, denoiser)),
    )


def _load_model(config: Config, device: torch.device) -> Denoiser:
    denoiser = load_denoiser(
        model_spec(config), device=device, dtype=DTYPES[config.model.dtype], options=model_options(config)
    )
    backend = config.model.backend
    if backend not in (None, denoiser.backend):
        raise InputError(
            f"model.backend={backend}: model {denoiser.name} is of the family {denoiser.backend}: set the key to that, "
            f"or choose a model of the family {backend}"
        )
    return denoiser


def _described(start: Start, denoiser: Denoiser) -> Callable[[EPDTable, Tensor | None], dict[str, Any]]:
    """Of a table and noise levels in the place of the start's: see `Kept`."""
    config = start.config
    watch, reward = config.logging, config.reward
    sources = [reward.weights_path, *reward.mix, *([] if watch.panel in (None, VERIFIER) else [watch.panel])]

    @cache
    def shared() -> dict[str, Any]:
        return {
            "model": model_fingerprint(model_spec(config), model_options(config)),
            "code": fingerprint([*SAMPLING_CODE, *denoiser.code, *sorted(Path(__file__).parent.glob("*.py"))]),
            "device": denoiser.device.type,
            "network dtype": str(denoiser.dtype),
            "reward dtype": str(_scoring(config, denoiser.device)["amp_dtype"]),
            **LIBRARIES,
            "rewards": [[str(source), reward_fingerprint(source, reward.cache_dir)] for source in sources],
            "panel": [watch.panel, verifier_fingerprint() if watch.panel == VERIFIER else None],
        }

    return lambda table, sigmas: {**shared(), **start.solver.with_numbers(table, sigmas).described()}


def make_policy(start: Start) -> Policy:
    """What the search moves, before its first step: its mean is the start.

    A grid can be trained of a settled start only.
    """
    return method_called(start.config.search.method).make_policy(start.solver, start.config)


def policy_of(start: Start, state: Mapping[str, Any], checkpoint: Path, device: torch.device | None = None) -> Policy:
    """The policy in a checkpoint's `state`, on `device` (None: the CPU); to be called in `fitting`.

    Raises:
        InputError: it did not begin at `start`, or its mean is no table, or not the one that the checkpoint names.
    """
    policy = make_policy(start)
    began = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.load_state_dict(state["trainer"]["policy"])
    for name, buffer in policy.named_buffers():
        if not torch.allclose(buffer, began[name], rtol=0, atol=POLICY_TOLERANCE):
            raise InputError(f"{checkpoint}: its policy did not begin at the table that it names as its start ({name})")
    try:
        mean = table_to_plain(*policy.to(device).mean())
    except ValueError as error:
        raise InputError(f"{checkpoint}: the policy's mean is no valid table: {error}") from error
    told = table_to_plain(table_from_plain(state["table"]), state["table"].get(GRID))
    require_equal(mean, told, POLICY_TOLERANCE, f"{checkpoint}: the policy's mean")
    return policy


def _panel(config: Config, denoiser: Denoiser) -> Reward | None:
    if config.logging.panel is None:
        return None
    if config.logging.panel == VERIFIER:
        require_verifiable(denoiser)
        return VerifierPanel()
    scoring = _scoring(config, denoiser.device)
    return load_reward(config.logging.panel, tokenizer_folder=config.reward.cache_dir, **scoring)


def _scoring(config: Config, device: torch.device) -> Scoring:
    half = torch.float16 if config.reward.enable_amp and device.type == "cuda" else None
    return {"device": device, "batch_size": config.reward.batch_size, "amp_dtype": half}


def _training_prompts(config: Config, denoiser: Denoiser | None) -> list[str]:
    """What is trained on; of an unconditional model the empty prompt, which every image has."""
    path = config.data.prompt_csv
    if path is None:
        return [""]
    if denoiser is not None and not denoiser.takes_prompts:
        raise InputError(f"model {denoiser.name} is unconditional and takes no prompts: set the key to null")
    if Path(path).name == COCO_PROMPTS and not Path(path).exists():
        raise InputError(f"there is no such file. {FETCH_COCO}")
    return _prompts_for(config, path, denoiser)


def _prompts_for(config: Config, path: str, denoiser: Denoiser | None) -> list[str]:
    """The prompts of a file; without those that are too long for the model, where the configuration says so."""
    prompts = read_prompts(path)
    if denoiser is None:
        return prompts
    long = {prompt for prompt in prompts if denoiser.too_long(prompt)}
    if long and config.data.on_long_prompt == "skip":
        _say_skipped(path, sum(prompt in long for prompt in prompts), len(prompts))
        prompts = [prompt for prompt in prompts if prompt not in long]
    try:
        denoiser.validate_prompts(prompts)
    except InputError as error:
        remedy = "\nTo leave out those that are too long: data.on_long_prompt=skip" if long & set(prompts) else ""
        raise InputError(f"{error}{remedy}") from None
    if not prompts:
        raise InputError(f"{path}: every prompt is too long for the model")
    return prompts


@cache
def _say_skipped(path: str, skipped: int, number: int) -> None:
    """Once a process: the files are read before a run, and by it."""
    log.warning("%s: %d of %d prompts are too long for the model and left out", path, skipped, number)


def _check_writable(folder: Path) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{existing} is no folder that can be written to")


def _heldout_prompts(config: Config, denoiser: Denoiser | None) -> list[str]:
    if config.logging.eval_prompts is None:  # of an unconditional model: images differ by their seeds
        return [""] * config.logging.eval_count
    prompts = _prompts_for(config, config.logging.eval_prompts, denoiser)
    if len(prompts) < config.logging.eval_count:
        raise InputError(
            f"{config.logging.eval_prompts}: holds {len(prompts)} prompts, and "
            f"logging.eval_count={config.logging.eval_count}: set it to {len(prompts)}"
        )
    trained_on = [] if config.data.prompt_csv is None else read_prompts(config.data.prompt_csv)
    shared = set(prompts[: config.logging.eval_count]) & set(trained_on)
    if shared:
        raise InputError(
            f"{config.logging.eval_prompts}: {len(shared)} held-out prompts are also trained on, for example "
            f"{min(shared)!r}: take them out of one of the files"
        )
    return prompts[: config.logging.eval_count]


def make_fabric(config: Config) -> Fabric:
    """Lightning's Fabric for the devices of the configuration; call `launch` on it.

    Raises:
        InputError: there is no such device.
    """
    return fabric_of(config.run.device, config.run.num_devices, config.run.num_nodes)


def _shard(fabric: Fabric) -> Shard:
    if fabric.world_size == 1:
        return Shard()
    return Shard(fabric.global_rank, fabric.world_size, lambda local: fabric.all_gather(local).flatten(0, 1))
