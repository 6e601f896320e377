"""Everything that a run of the RL job can be told: typed, closed, cross-checked, all faults in one message.

Precedence, lowest first: the defaults below, the `--config` file, the predictor snapshot (it fills what is null and
must not be contradicted by the file), `--override`. `load_config` does the first, second and last, `apply_snapshot` the
third.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from models.options import CHANGING, ModelOptions
from models.registry import is_unconditional, usual_prompts
from schedules import SCHEDULES
from training.ppo.cold_start import DRAWN, TRAINED
from training.ppo.reward_names import reward_name
from training.runs.configuration import OVERRIDE, Disagreements, LoadedConfig, Schema, knob, raise_all
from training.runs.run_folder import name_fault
from training.solver import USUAL_RHO, Solver, model_of


@dataclass
class RunConfig:
    """Where a run writes, on what it runs."""

    output_root: str = knob("exps", "folder in which the run's own folder is made")
    run_name: str = knob("ppo", "last part of the run folder's name")
    seed: int = knob(0, "seed of the policy's draws, the initial noise and the prompt order", at_least=0, below=2**63)
    device: str = knob("auto", "auto, cpu, cuda, mps, or cuda:N; per process")
    num_devices: int = knob(1, "processes per node, one device each; the prompts are split among them", at_least=1)
    num_nodes: int = knob(1, "machines (nodes) of the run", at_least=1)


@dataclass
class DataConfig:
    """The table to start from and the prompts to train on."""

    predictor_snapshot: str = knob(
        "", "snapshot (.pkl or .json), its folder, or an experiment number in exps/", required=True
    )
    prompt_csv: str | None = knob(
        None,
        "training prompts: a CSV file with a column `text`; null: the model's usual ones, none of an unconditional one",
        required=True,
    )
    shuffle: bool = knob(True, "a new prompt order each epoch, drawn from run.seed; false: the file's order")
    on_long_prompt: str = knob(
        "error",
        "prompts, held-out ones too, that are longer than the model's text encoder reads: an error, or skip them",
        choices=("error", "skip"),
    )


@dataclass
class ModelConfig:
    """The frozen model and the solver's settings; null: as the predictor snapshot says."""

    dataset_name: str | None = knob(None, "name of the model's world in the snapshot (shapes, ms_coco, ...)")
    model_path: str | None = knob(
        None, "diffusers folder, .ckpt or .safetensors file, or registered name; null: what dataset_name stands for"
    )
    backend: str | None = knob(
        None, "the model's family, ldm, sdxl, sd3, flux, dit or ddpm; null: as the snapshot says"
    )
    guidance_type: str | None = knob(None, "cfg: classifier-free guidance; uncond: none", choices=("cfg", "uncond"))
    guidance_rate: float | None = knob(None, "classifier-free guidance scale; 1 is no guidance", at_least=0)
    schedule_type: str | None = knob(None, "kind of the sigma grid", choices=tuple(SCHEDULES))
    schedule_rho: float | None = knob(None, "exponent of the sigma grid", above=0)
    num_steps: int | None = knob(None, "grid points of the sampler, one more than its intervals", at_least=2)
    num_points: int | None = knob(None, "parallel network evaluations per interval, K", at_least=0)
    lora: str | None = knob(None, "LoRA weights to add: FILE or FILE:SCALE, several with commas between them")
    vae: str | None = knob(None, "folder of another VAE, or of a pipeline whose VAE is to be used")
    height: int | None = knob(None, "of the images, in pixels; null: the model's own", at_least=1)
    width: int | None = knob(None, "of the images, in pixels; null: the model's own", at_least=1)
    negative_prompt: str | None = knob(None, "what guidance leads away from; null: the empty prompt")
    without_t5: bool = knob(False, "leave the text encoder T5 out, where the model can do without it")
    text_on_cpu: bool = knob(False, "run the text encoders on the CPU: slower, and out of the device's memory")
    dtype: str = knob("float32", "precision of the frozen network", choices=("float32", "float16", "bfloat16"))
    compile: bool = knob(
        False,
        "have the network compiled by torch.compile, for one number of rows: the first step takes minutes longer; what "
        "is compiled is kept in outputs/compiled",
    )


@dataclass
class RewardConfig:
    """The training reward."""

    weights_path: str = knob(
        "",
        "preference checkpoint in HPSv2.1's (open_clip) layout, or pickscore, clip_score, aesthetic, imagereward, mps, "
        "or a function of yours, my_module:my_reward",
        required=True,
    )
    mix: dict[str, float] = knob(  # noqa: RUF009 - a factory, see knob
        {},
        "further rewards, named as weights_path is -> weight beside weights_path's 1; each is standardised by the "
        "running mean and deviation of all its scores so far",
    )
    batch_size: int = knob(16, "images per forward pass of the reward model, per device", at_least=1)
    enable_amp: bool = knob(False, "half precision in the reward model; CUDA only")
    cache_dir: str | None = knob(
        None, "folder of the CLIP rewards' tokenizer; null: the one named beside each checkpoint"
    )


@dataclass
class PPOConfig:
    """Policy and optimisation."""

    steps: int = knob(100, "rollouts with their updates, the whole run, resumed parts included", at_least=1)
    rollout_batch_size: int = knob(32, "images per step over all devices; a multiple of rloo_k", at_least=2)
    rloo_k: int = knob(4, "tables (images) drawn per prompt, the leave-one-out group", at_least=2)
    shared_noise: bool = knob(True, "a group shares its initial noise: its rewards differ by the table alone")
    baseline: str = knob(
        "prompt",
        "leave-one-out groups: one prompt each, the same shrunk towards the other prompts' mean, or mixed as in the "
        "public code",
        choices=("prompt", "mixed", "shrunk"),
    )
    ppo_epochs: int = knob(1, "passes over each rollout", at_least=1)
    minibatch_size: int = knob(32, "images per optimizer update, over all devices", at_least=1)
    learning_rate: float = knob(1e-3, "Adam's step size at the start of the schedule", above=0)
    learning_rate_schedule: str = knob(
        "cosine",
        "decay from learning_rate over ppo.steps; to zero unless constant",
        choices=("constant", "linear", "cosine"),
    )
    clip_range: float = knob(0.2, "the probability ratio is clipped to 1 +- this", above=0, at_most=1)
    kl_coef: float = knob(0.0, "weight of KL(policy || cold start), nats summed over all that is trained", at_least=0)
    entropy_coef: float = knob(0.0, "weight of the policy's entropy bonus, nats", at_least=0)
    max_grad_norm: float = knob(1.0, "gradients are clipped to this Euclidean norm", above=0)
    train: list[str] = knob(  # noqa: RUF009 - a factory, see knob
        list(TRAINED),
        "what is drawn and tuned: columns of the table, and grid, the noise levels between the first and the last; a "
        "column that the start lacks begins where it changes nothing",
        choices=tuple(DRAWN),
        required=True,
    )
    dirichlet_concentration: float = knob(
        20.0,
        "total concentration c of each Dirichlet of positions and of weights at the cold start",
        at_least=1e-6,
        at_most=1e9,
    )
    grid_concentration: float = knob(
        1000.0, "that of the Dirichlet of the grid's gaps in log sigma, where it is trained", at_least=1e-6, at_most=1e9
    )
    scale_std: float = knob(
        0.05,
        "standard deviation of log scale_dir and log scale_time at the cold start, where they are trained",
        above=0,
    )
    guidance_std: float = knob(
        0.1, "standard deviation of the log guidance of each evaluation at the cold start, where it is trained", above=0
    )
    history_std: float = knob(
        0.05,
        "standard deviation of each entry of history and direction_history at the cold start, where they are trained",
        above=0,
    )
    decode_rgb: bool = knob(True, "as public configurations have it: rewards score decoded RGB images; only true")
    max_rows: int | None = knob(
        None,
        "most rows (images x points x guidance halves) in one network call, per device; null: on CUDA 128 at Stable "
        "Diffusion 1.x's size and fewer at a larger one, else 64; halved where memory does not suffice",
        at_least=1,
    )
    decode_chunk_size: int = knob(8, "latents decoded at once, per device", at_least=1)
    max_nonfinite_share: float = knob(
        0.5,
        "stop when more than this share of a step's groups was dropped for NaN or infinite rewards (not with "
        "search.method=cma_es, to which such a candidate is as good as the worst)",
        at_least=0,
        at_most=1,
    )


METHODS = ("ppo", "cma_es", "reward_gradient")


@dataclass
class SearchConfig:
    """How the solver is moved; what the methods share stands under `ppo`."""

    method: str = knob(
        "ppo",
        "ppo: PPO of a distribution over solvers; cma_es: CMA-ES, without gradients; reward_gradient: Adam along the "
        "gradient of a differentiable reward",
        choices=METHODS,
    )
    population: int | None = knob(
        None,
        "cma_es: candidates a generation, each tried on every prompt of the step; null: the largest divisor of "
        "ppo.rollout_batch_size that is at most CMA-ES's own default",
        at_least=2,
    )
    sigma0: float = knob(
        1.0, "cma_es: spread of the first candidates, in standard deviations of the draws that ppo would make", above=0
    )
    learning_rate: float = knob(
        0.05, "reward_gradient: Adam's step size at first; a cosine takes it to 0 over ppo.steps", above=0
    )


@dataclass
class LoggingConfig:
    """What a run writes down, and the held-out watch."""

    log_interval: int = knob(1, "steps between console lines", at_least=1)
    save_interval: int = knob(50, "steps between checkpoints; the last step and an interrupt are saved too", at_least=1)
    preview_prompts: int = knob(
        4, "held-out prompts whose images are kept at each evaluation, from the top", at_least=0
    )
    eval_interval: int | None = knob(
        None,
        "steps between held-out evaluations of the mean table; 0: none; null: 25, or none where eval_prompts is null",
        at_least=0,
    )
    eval_prompts: str | None = knob(
        None, "held-out prompts: a CSV file with a column `text`; null of an unconditional model"
    )
    eval_count: int = knob(
        64, "held-out images per evaluation: prompts from the top of the file, one image each", at_least=2
    )
    eval_seed: int = knob(0, "seed of the first held-out image; the next has the next seed", at_least=0, below=2**62)
    panel: str | None = knob(
        None, "judge that is never trained on: verifier (shapes), or a reward as weights_path takes it; null: none"
    )
    cache: str = knob(
        "outputs/evaluation-cache",
        "folder where held-out scores of the start and of classical solvers are kept for runs that begin alike",
    )
    stop_on_reward_hacking: bool = knob(False, "end the run when the held-out reward rises while the panel falls")


@dataclass
class Config:
    """One run of the RL job."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def _told_by(snapshot: Solver, model: ModelConfig) -> dict[str, Any]:
    """What a predictor snapshot says of keys of `model`; None where it says nothing."""
    metadata, table, ours = snapshot.origin.metadata, snapshot.table, model.schedule_type
    told = {name: metadata.get(name) for name in SNAPSHOT_KEYS}
    told |= {"num_steps": table.num_steps, "num_points": table.num_points}  # no override changes them
    if ours not in (None, told["schedule_type"]):
        told["schedule_rho"] = None  # the snapshot's exponent belongs to its own schedule
    if told["schedule_rho"] is None:
        told["schedule_rho"] = USUAL_RHO.get(ours or told["schedule_type"], 1.0)
    if snapshot.sigmas is not None and ours is not None:
        told["schedule_type"] = "noise levels of its own"
    if told["guidance_type"] is None and told["guidance_rate"] is not None:
        told["guidance_type"] = "cfg"
    if "uncond" in (model.guidance_type, told["guidance_type"]):
        told["guidance_rate"] = 1.0
    return told


class _Reconciled:
    """A configuration held against a predictor snapshot, key by key: values chosen, overrides that won, faults."""

    def __init__(self, loaded: LoadedConfig[Config], snapshot: Solver) -> None:
        self.loaded, self.snapshot = loaded, snapshot
        self.chosen: dict[str, Any] = {}
        self.notes: list[str] = []
        self.faults: list[str] = []

    def settle(self, name: str, theirs: Any, answered: Collection[str]) -> None:
        """Choose a value for what the snapshot may say; `answered` are names that its own numbers answer."""
        key, ours, where = f"model.{name}", getattr(self.loaded.config.model, name), self.snapshot.where
        if name in answered and ours is None:
            self.chosen[name] = None
        elif name in answered:
            self.faults.append(
                f"{key}={ours}: the table in {where} has a guidance scale of its own for each evaluation: "
                f"set the key to null"
            )
        elif ours is None and theirs is None and name not in GUIDANCE_KEYS:
            meaning = KNOBS[key].metadata["meaning"]
            self.faults.append(f"{key} is null and {where} does not say it: set it ({meaning})")
        elif ours is None or theirs is None or ours == theirs:
            self.chosen[name] = theirs if ours is None else ours
        elif name in SHAPE_KEYS:
            self.faults.append(
                f"{key}={ours}: the table in {where} has {theirs}, and its shape cannot be changed: "
                f"leave the key null, or distil another table with train.py"
            )
        else:
            self.insist(name, ours, theirs, "set the key to null")

    def insist(self, name: str, ours: Any, theirs: Any, remedy: str) -> None:
        """Choose the configuration's value against the snapshot's, which only an override may."""
        key = f"model.{name}"
        self.chosen[name] = ours
        if key in self.loaded.overridden:
            self.notes.append(f"{key}={ours} by {OVERRIDE}; {self.snapshot.where} says {theirs}")
        else:
            insist = f"insist with {OVERRIDE} {key}={ours}"
            self.faults.append(f"{key}={ours}: {self.snapshot.where} was made with {theirs}: {remedy}, or {insist}")


def apply_snapshot(loaded: LoadedConfig[Config], snapshot: Solver) -> tuple[Config, list[str]]:
    """Fill what the configuration leaves null from the predictor snapshot, and hold the rest against it.

    Returns:
        The configuration without nulls in what the solver needs, except a guidance that neither gives (which is then
        the model's own), and a line per override that beat the snapshot. What the snapshot's own numbers say in place
        of a key (noise levels for the schedule, a guidance column) stays null.

    Raises:
        InputError: lists every value that the snapshot fixes and the configuration contradicts, and what else neither
            gives.
    """
    metadata, model = snapshot.origin.metadata, loaded.config.model
    told, reconciled = _told_by(snapshot, model), _Reconciled(loaded, snapshot)
    chosen, faults = reconciled.chosen, reconciled.faults
    answered = SCHEDULE_KEYS if snapshot.sigmas is not None and model.schedule_type is None else ()
    answered += GUIDANCE_KEYS if snapshot.has_guidance_column else ()
    for name, theirs in told.items():
        reconciled.settle(name, theirs, answered)
    chosen["backend"] = metadata.get("backend") if model.backend is None else model.backend
    if metadata.get("backend") not in (None, chosen["backend"]):
        faults.append(
            f"model.backend={model.backend}: {snapshot.where} was made for the family {metadata['backend']}: choose "
            f"a table for {model.backend}, or leave the key null"
        )
    for name in CHANGING:
        ours, theirs = getattr(model, name), getattr(snapshot.model_options, name)
        if ours and ours != theirs:
            reconciled.insist(name, ours, theirs, "leave the key out")
        elif not ours:
            chosen[name] = theirs
    if model.model_path is None and chosen.get("dataset_name") == told["dataset_name"]:
        chosen["model_path"] = metadata.get("model_path")
    config = with_usual(dataclasses.replace(loaded.config, model=dataclasses.replace(model, **chosen)))
    if config.data.prompt_csv is None and not is_unconditional(model_spec(config)):
        faults.append(
            f"data.prompt_csv is null and {config.model.model_path or config.model.dataset_name} is no model that has "
            f"usual prompts: name a CSV file with a column `text`"
        )
    raise_all(faults)
    return config, reconciled.notes


def model_spec(config: Config) -> str | None:
    """What `load_denoiser` is asked for; None while only the predictor would say."""
    model = config.model
    return model.model_path or model_of(model.dataset_name, model.backend)


def model_options(config: Config) -> ModelOptions:
    """How the model is to be loaded. Raises InputError where a text of it is none."""
    return ModelOptions(**{field.name: getattr(config.model, field.name) for field in dataclasses.fields(ModelOptions)})


def with_usual(config: Config) -> Config:
    """The configuration with what null stands for: the model's usual prompts, and how often to evaluate.

    The prompts stay null where the model is not known, or has none.
    """
    model, data, logging = config.model, config.data, config.logging
    if data.prompt_csv is None:
        dataset = model_of(model.dataset_name, model.backend)
        data = dataclasses.replace(data, prompt_csv=usual_prompts(model.model_path, dataset))
    if logging.eval_interval is None:
        interval = 0 if logging.eval_prompts is None else USUAL_EVAL_INTERVAL
        logging = dataclasses.replace(logging, eval_interval=interval)
    return dataclasses.replace(config, data=data, logging=logging)


MIX_WEIGHTS = (1e-6, 1e6)
"""Least and largest size of a weight beside the main reward's 1: beyond it one of the two is lost in rounding."""

USUAL_EVAL_INTERVAL = 25

SHAPE_KEYS = ("num_steps", "num_points")
FIXED_FILES = ("data.predictor_snapshot", "model.model_path", "reward.weights_path", "logging.eval_prompts")
FIXED = (
    *FIXED_FILES,
    "run.seed",
    "model.dataset_name",
    "model.backend",
    "model.guidance_type",
    "model.guidance_rate",
    "model.schedule_type",
    "model.schedule_rho",
    *(f"model.{name}" for name in CHANGING),
    "reward.mix",
    "ppo.train",
    *(f"ppo.{key}" for key in dict.fromkeys(drawn.spread for drawn in DRAWN.values())),
    "search.method",
    "search.population",
    "search.sigma0",
    "logging.eval_count",
    "logging.eval_seed",
    "logging.panel",
)
"""What a resumed run must have as it began: its start, its reward, and what its held-out scores are compared on."""

GUIDANCE_KEYS = ("guidance_type", "guidance_rate")
SCHEDULE_KEYS = ("schedule_type", "schedule_rho")
SNAPSHOT_KEYS = ("dataset_name", *GUIDANCE_KEYS, *SCHEDULE_KEYS)


def _disagreements(config: Config) -> Disagreements:
    """Values that are each allowed and cannot go together: their keys, why, and what to set instead."""
    yield from _batch_disagreements(config)
    yield from _search_disagreements(config)
    yield from _judge_disagreements(config)
    if fault := name_fault(config.run.run_name):
        yield {"run.run_name"}, fault
    names = [reward_name(path) for path in (config.reward.weights_path, *config.reward.mix)]
    if len(set(names)) < len(names):
        yield (
            {"reward.weights_path", "reward.mix"},
            f"reward.mix: two rewards are called {max(names, key=names.count)}",
        )
    if not config.ppo.decode_rgb:
        yield {"ppo.decode_rgb"}, "ppo.decode_rgb=false: every reward here scores RGB images; set it to true"
    low, high = MIX_WEIGHTS
    if not all(low <= abs(weight) <= high for weight in config.reward.mix.values()):
        yield (
            {"reward.mix"},
            f"reward.mix={config.reward.mix}: every weight must be a number other than 0, its size {low:g} to {high:g}",
        )


def group_size(config: Config) -> int:
    """Images on each prompt of a step; of CMA-ES, once its population is settled."""
    return {"ppo": config.ppo.rloo_k, "cma_es": config.search.population or 1, "reward_gradient": 1}[
        config.search.method
    ]


def _batch_disagreements(config: Config) -> Disagreements:
    ppo, group, devices = config.ppo, group_size(config), config.run.num_devices * config.run.num_nodes
    key = "search.population" if config.search.method == "cma_es" else "ppo.rloo_k"
    rollout = {"ppo.rollout_batch_size", key}
    update = {"ppo.rollout_batch_size", "ppo.minibatch_size"}
    split = {"run.num_devices", "run.num_nodes"}
    prompts, rest = divmod(ppo.rollout_batch_size, group)
    if rest:
        nearest = max(1, round(ppo.rollout_batch_size / group)) * group
        yield (
            rollout,
            f"ppo.rollout_batch_size={ppo.rollout_batch_size} is not a multiple of {key}={group}: "
            f"every prompt needs a whole group; set ppo.rollout_batch_size={nearest}",
        )
    elif prompts % devices:
        even = math.ceil(prompts / devices) * devices * group
        yield (
            rollout | split,
            f"ppo.rollout_batch_size={ppo.rollout_batch_size} holds {prompts} prompts, which cannot be split evenly "
            f"among {devices} devices: set ppo.rollout_batch_size={even}",
        )
    if config.search.method == "ppo" and ppo.rollout_batch_size % ppo.minibatch_size:
        yield (
            update,
            f"ppo.minibatch_size={ppo.minibatch_size} does not divide ppo.rollout_batch_size={ppo.rollout_batch_size}: "
            f"updates would weigh images unequally; set ppo.minibatch_size={ppo.rollout_batch_size}",
        )


def _search_disagreements(config: Config) -> Disagreements:
    method = config.search.method
    if method == "cma_es" and not config.ppo.shared_noise:
        yield (
            {"search.method", "ppo.shared_noise"},
            "search.method=cma_es tries every candidate on the same noise: set ppo.shared_noise=true",
        )
    if method == "reward_gradient" and config.run.num_devices * config.run.num_nodes > 1:
        yield (
            {"search.method", "run.num_devices", "run.num_nodes"},
            "search.method=reward_gradient runs in one process: set run.num_devices=1 and run.num_nodes=1",
        )


def _judge_disagreements(config: Config) -> Disagreements:
    logging = config.logging
    judged = logging.eval_interval or (logging.eval_interval is None and logging.panel)
    if judged and logging.eval_prompts is None and not is_unconditional(model_spec(config)):
        asked = "eval_interval" if logging.eval_interval else "panel"
        yield (
            {"logging.eval_interval", "logging.eval_prompts", "logging.panel"},
            f"logging.{asked}={getattr(logging, asked)} but logging.eval_prompts is null: "
            f"name a CSV file, or set logging.eval_interval=0",
        )
    if logging.stop_on_reward_hacking and (logging.panel is None or not with_usual(config).logging.eval_interval):
        yield (
            {"logging.stop_on_reward_hacking", "logging.panel", "logging.eval_interval"},
            "logging.stop_on_reward_hacking=true needs logging.panel and logging.eval_interval: "
            "without a panel no hacking is seen",
        )
    if logging.panel in {config.reward.weights_path, *config.reward.mix}:
        yield (
            {"logging.panel", "reward.weights_path", "reward.mix"},
            f"logging.panel={logging.panel} is trained on: a panel must be a judge that the reward does not contain",
        )
    if logging.preview_prompts > logging.eval_count:
        yield (
            {"logging.preview_prompts", "logging.eval_count"},
            f"logging.preview_prompts={logging.preview_prompts} is more than logging.eval_count={logging.eval_count}: "
            f"set logging.preview_prompts={logging.eval_count} or less",
        )
    if logging.eval_prompts is not None and logging.eval_prompts == config.data.prompt_csv:
        yield (
            {"logging.eval_prompts", "data.prompt_csv"},
            f"logging.eval_prompts and data.prompt_csv are both {logging.eval_prompts}: "
            f"held-out prompts must not be trained on",
        )


def _instead_of_options(options: Any) -> str:
    """The keys that say here what the public code base's model.backend_options say."""
    names = {
        "model_name_or_path": "model.model_path",
        "torch_dtype": "model.dtype",
        "enable_model_cpu_offload": "model.text_on_cpu",
    }
    told = options if isinstance(options, Mapping) else {}
    said = [f"{names[key]}={value}" for key, value in told.items() if key in names and value is not None]
    return f"write {' '.join(said) or ', '.join(names.values())} in its place"


def _instead_of_multi(multi: Any) -> str:
    """The weights of the public code base's reward.multi as reward.weights_path, of weight 1, and reward.mix."""
    names = {"hps": "weights/HPS_v2.1_compressed.pt", "clip": "clip_score"}
    told = multi.get("weights") if isinstance(multi, Mapping) else None
    weights = {}
    for name, weight in (told if isinstance(told, Mapping) else {}).items():
        with suppress(TypeError, ValueError):
            weights |= {names.get(name, name): float(weight)} if float(weight) else {}
    if not weights:
        return "name one reward in reward.weights_path, and others with their weights in reward.mix"
    (main, one), *others = weights.items()
    mix = ", ".join(f"{name}: {weight / one:g}" for name, weight in others)
    return f"write reward.weights_path={main} reward.mix={{{mix}}} in its place"


OF_THE_TABLE = "leave it out: the predictor snapshot says it, or the model"
RETIRED: dict[str, str | Callable[[Any], str]] = {
    "model.backend_options": _instead_of_options,
    "model.resolution": lambda side: f"write model.height={side} model.width={side} in its place",
    **{f"model.{key}": OF_THE_TABLE for key in ("sigma_min", "sigma_max", "flowmatch_mu", "flowmatch_shift")},
    "reward.type": "leave it out: reward.weights_path and reward.mix say it",
    "reward.multi": _instead_of_multi,
} | {
    f"ppo.train_{scale}": f"name {scale} in ppo.train, ppo.train=[{', '.join(TRAINED)}, {scale}], where it was true"
    for scale in ("scale_dir", "scale_time")
}

SCHEMA = Schema(Config, _disagreements, shipped="training/ppo/cfgs/", retired=RETIRED)
KNOBS = SCHEMA.knobs
load_config, build_config = SCHEMA.load, SCHEMA.build
