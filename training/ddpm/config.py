"""Everything that the three commands of the second job can be told, in one configuration for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from models.devices import device_fault
from models.prompts import text_fault
from training.runs.configuration import Disagreements, Schema, knob, value_of

RENDERED, SAMPLED = "rendered", "sampled"
CLASSIFIER, PREFERENCE = "classifier", "preference"


@dataclass
class PathConfig:
    """What is read, and where runs are logged."""

    real_img: str = knob(
        RENDERED, "folder of real images, searched deeply; `rendered`: scenes of the shapes world", required=True
    )
    fake_img: str = knob(
        SAMPLED, "folder of generated images, searched deeply; `sampled`: drawn from path.ddpm now", required=True
    )
    ddpm: str = knob("src/shapes_ddpm", "DDPM to start from: diffusers folder, hub id, or state dict", required=True)
    architecture: str | None = knob(
        None, "for a state dict: folder or hub id of the DDPM whose architecture it has; null: the state dict's folder"
    )
    rm: str | None = knob(None, "reward model that is trained against; null: train_reward.save")
    judge: str | None = knob(None, "reward model that is never trained against; null: <rm>-judge beside path.rm")
    preference: str | None = knob(
        None, "for finetune.reward=preference, a reward as the main job's reward.weights_path takes it"
    )
    runs: str = knob("runs", "folder in which each command makes a folder of its own: tensorboard --logdir runs")


@dataclass
class FinetuneConfig:
    """PPO of the DDPM's weights."""

    lr: float = knob(1e-4, "AdamW's step size", above=0, at_most=1e30)
    num_epochs: int = knob(40, "rollouts with their updates, the whole run, resumed parts included", at_least=1)
    ddim_steps: int = knob(
        10, "DDIM steps of an image, up to the DDPM's training steps; the last is no action", at_least=2
    )
    eta: float = knob(1.0, "randomness of DDIM: 1 is the DDPM's own; 0, none, cannot be trained", at_least=0, at_most=1)
    clip_eps: float = knob(0.2, "importance ratios are clipped to 1 +- this", above=0, below=1)
    episodes_per_epoch: int = knob(32, "images rolled out per epoch", at_least=2)
    minibatch: int | None = knob(None, "images per optimizer update; null: episodes_per_epoch", at_least=1)
    microbatch: int = knob(
        16, "images in one network call; the graph of one such call, one step of them, is held at a time", at_least=1
    )
    passes: int = knob(1, "passes over each epoch's images", at_least=1)
    ratio: str = knob(
        "step", "what is clipped: each step's ratio, or the whole trajectory's", choices=("step", "trajectory")
    )
    baseline: str = knob(
        "leave_one_out",
        "subtracted from a reward: the mean of the epoch's others, a running mean of earlier epochs, or nothing",
        choices=("leave_one_out", "running", "none"),
    )
    normalize_advantages: bool = knob(
        True, "divide advantages by the deviation of the epoch's rewards; false: kl_coef is in the reward's own unit"
    )
    kl_coef: float = knob(
        0.0,
        "weight of KL(policy || starting DDPM), nats summed over the steps; its gradient is taken at visited states: "
        "what a step does to the KL of later ones is left out",
        at_least=0,
    )
    grad_clip: float = knob(1.0, "gradients are clipped to this Euclidean norm", above=0)
    lora_rank: int = knob(
        0, "train low-rank additions of this rank to convolutions and attention; 0: all weights", at_least=0
    )
    ema_decay: float = knob(
        0.0, "the DDPM that is kept averages the weights with this decay; 0: the last ones", at_least=0, below=1
    )
    reward: str = knob(
        CLASSIFIER, "path.rm's log-odds of being real, or path.preference's score", choices=(CLASSIFIER, PREFERENCE)
    )
    prompt: str | None = knob(None, "what the preference reward is asked to see")
    eval_interval: int = knob(10, "epochs between held-out evaluations; 0: none", at_least=0)
    save_interval: int = knob(10, "epochs between checkpoints; the last and an interrupt are saved too", at_least=1)
    save: str = knob(
        "outputs/ddpm", "folder that the fine-tuned DDPM is written to, in diffusers' layout", required=True
    )


@dataclass
class TrainRewardConfig:
    """The reward model, and the judge beside it: two classifiers of real images against all else, on disjoint data."""

    num_img: int = knob(1000, "images of each kind, real and fake: the most that are taken from a folder", at_least=20)
    num_noise: int = knob(
        500,
        "real images that count as not real: half under noise of random strength, half faded to one of their colours",
        at_least=0,
    )
    heldout_share: float = knob(0.2, "share of the images that no classifier is trained on", above=0, at_most=0.5)
    batch_size: int = knob(64, "images per update", at_least=2)
    num_workers: int = knob(2, "threads that read image files; 0 is one, too", at_least=0)
    lr: float = knob(1e-3, "AdamW's step size", above=0, at_most=1e30)
    label_smoothing: float = knob(
        0.1, "share of each label that is spread evenly over both classes", at_least=0, below=1
    )
    augment: bool = knob(
        False,
        "mirror every image of a batch, real or not, by chance either way, make it a negative, reorder its channels: "
        "a classifier can then hardly go by brightness or hue, which a DDPM changes more easily than shapes",
    )
    num_epochs: int = knob(5, "passes over the images", at_least=1)
    width: int = knob(16, "channels of the first layer; they double with each layer, up to 8 times", at_least=8)
    save: str = knob("outputs/ddpm_reward.pt", "file that the reward model is written to", required=True)


@dataclass
class EvalConfig:
    """Held-out images: of the evaluation, and of the watch during fine-tuning (with other seeds)."""

    num_img: int = knob(128, "images drawn from each DDPM, with equal seeds", at_least=8)
    batch_size: int = knob(32, "images in one network call", at_least=1)
    shown: int = knob(8, "images in the picture of before and after", at_least=1)


@dataclass
class DDPMConfig:
    """One configuration for train_reward_model, finetune and eval."""

    seed: int = knob(0, "seed of everything that is random", at_least=0, below=2**63)
    device: str = knob("auto", "auto, cpu, cuda, or cuda:N")
    path: PathConfig = field(default_factory=PathConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    train_reward: TrainRewardConfig = field(default_factory=TrainRewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def reward_file(config: DDPMConfig) -> Path:
    """The reward model that fine-tuning reads."""
    return Path(config.path.rm or config.train_reward.save)


def judge_file(config: DDPMConfig) -> Path:
    """The reward model that is never trained against."""
    file = reward_file(config)
    return Path(config.path.judge) if config.path.judge else file.with_name(f"{file.stem}-judge{file.suffix}")


def _disagreements(config: DDPMConfig) -> Disagreements:
    if fault := device_fault(config.device):
        yield {"device"}, f"device={config.device}: {fault}"
    yield from _switches(config)
    yield from _batch_disagreements(config.finetune)
    yield from _file_disagreements(config)
    if config.finetune.eta == 0:
        yield (
            {"finetune.eta"},
            "finetune.eta=0: DDIM is then deterministic, so no action has a probability and PPO has nothing to learn "
            "from; set finetune.eta between 0 and 1, for example 1",
        )
    prompt = config.finetune.prompt
    if prompt and (fault := text_fault(prompt)):
        yield {"finetune.prompt"}, f"finetune.prompt={prompt!r}: {fault}"
    if config.eval.shown > config.eval.num_img:
        yield (
            {"eval.shown", "eval.num_img"},
            f"eval.shown={config.eval.shown} is more than eval.num_img={config.eval.num_img}",
        )


def _switches(config: DDPMConfig) -> Disagreements:
    """Public configurations say whether to save, to a name that is always the same."""
    places = {"finetune.save": FinetuneConfig.save, "train_reward.save": config.path.rm or TrainRewardConfig.save}
    for key, usual in places.items():
        value = value_of(config, key)
        if value.lower() in ("true", "false"):
            yield {key}, f"{key}={value}: what is trained is always written, and this is where to; set {key}={usual}"


def _batch_disagreements(finetune: FinetuneConfig) -> Disagreements:
    minibatch = finetune.minibatch or finetune.episodes_per_epoch
    if minibatch % finetune.microbatch:
        yield (
            {"finetune.minibatch", "finetune.microbatch", "finetune.episodes_per_epoch"},
            f"finetune.microbatch={finetune.microbatch} does not divide the {minibatch} images of an update: "
            f"set finetune.microbatch={minibatch}, or a divisor of it",
        )
    if finetune.episodes_per_epoch % minibatch:
        yield (
            {"finetune.minibatch", "finetune.episodes_per_epoch"},
            f"finetune.minibatch={minibatch} does not divide "
            f"finetune.episodes_per_epoch={finetune.episodes_per_epoch}: updates would weigh images unequally",
        )


def _overlap(source: str | None, output: Path) -> bool:
    """Whether one is the other or lies in it."""
    if source is None:
        return False
    start, saved = Path(source).resolve(), output.resolve()
    return start == saved or start in saved.parents or saved in start.parents


def _file_disagreements(config: DDPMConfig) -> Disagreements:
    if not reward_file(config).name:
        yield {"path.rm", "train_reward.save"}, f"the reward model's path {reward_file(config)} names no file"
        return
    written = {
        "finetune.save": Path(config.finetune.save),
        "train_reward.save": Path(config.train_reward.save),
        "path.rm": reward_file(config),
        "path.judge": judge_file(config),
    }
    for source in ("ddpm", "architecture"):
        for key, output in written.items():
            if _overlap(getattr(config.path, source), output):
                yield (
                    {f"path.{source}", key, "train_reward.save"},
                    f"{key}={output} and path.{source}={getattr(config.path, source)} overlap: "
                    "the DDPM that a run starts from is never overwritten",
                )
    own = config.path.real_img != RENDERED and config.path.fake_img != SAMPLED
    if own and _overlap(config.path.real_img, Path(config.path.fake_img)):
        yield (
            {"path.real_img", "path.fake_img"},
            f"path.real_img={config.path.real_img} and path.fake_img={config.path.fake_img} overlap: both are searched "
            "deeply, and images would count as real and as fake",
        )
    if judge_file(config).resolve() == reward_file(config).resolve():
        yield {"path.rm", "path.judge"}, "path.judge and path.rm are one file: a judge must never be trained against"
    if config.finetune.reward == PREFERENCE and not (config.path.preference and config.finetune.prompt):
        yield (
            {"finetune.reward", "finetune.prompt", "path.preference"},
            "finetune.reward=preference needs path.preference (a checkpoint) and finetune.prompt (what it should see)",
        )


SCHEMA = Schema(DDPMConfig, _disagreements, shipped="configs/")
