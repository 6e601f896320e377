"""The learned reward: a small classifier of real images against all else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errors import InputError, first_line
from models.loading import fill
from models.randomness import seed_globally
from models.skeletons import skeleton
from training.runs.checkpoint import read_tensors, write_tensors

FORMAT = 2  # 1 saw the mean colour
LARGEST_LOG_ODDS = 20.0  # of a frozen classifier: odds of 5e8, more than any number of images can tell
LARGEST_SIZE = 2**16  # of an image, and of a layer
SMALLEST_MAP = 4  # pixels, of the last layer's output
MAKE_ONE = "python -m scripts.train_reward_model --cfg <the same configuration>  writes one"


class RealFakeClassifier(nn.Module):
    """Images to the log-odds of being real: strided convolutions down to 4 pixels, their mean, a linear map.

    A reward has to tell poor images from poorer ones, so nothing here levels out: no normalisation (with it, four in
    five images of a poor DDPM got the same reward to within 0.1), and nothing bent after the mean. It does not see an
    image's mean colour either: that is what a DDPM changes first for a reward, and no image is better for it.
    """

    def __init__(self, image_size: tuple[int, int], width: int) -> None:
        """`image_size`: (H, W) that images are brought to; `width`: channels of the first layer."""
        super().__init__()
        self.image_size, self.width = image_size, width
        halvings = max(1, round(math.log2(min(image_size) / SMALLEST_MAP)))
        layers: list[nn.Module] = []
        channels = 3
        for halving in range(halvings):
            wider = width * 2 ** min(halving, 3)
            layers += [_convolution(channels, wider, stride=2), nn.SiLU(), _convolution(wider, wider), nn.SiLU()]
            channels = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Log-odds [N] of being real, of images [N, 3, H, W] in [0, 1]; another size is resized.

        Out of training they are clamped: a few images of pure noise, at -60, would else outweigh all others in a mean.
        """
        if images.shape[-2:] != self.image_size:
            images = functional.interpolate(images, self.image_size, mode="bicubic", antialias=True)
        centred = 2 * (images - images.mean((2, 3), keepdim=True))
        log_odds = self.head(self.body(centred).mean((2, 3))).squeeze(1)
        return log_odds if self.training else log_odds.clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)


def _convolution(channels: int, wider: int, stride: int = 1) -> nn.Conv2d:
    """3x3, with weights that keep the size of what passes through (arXiv 1502.01852, equation 10)."""
    layer = nn.Conv2d(channels, wider, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def new_classifier(image_size: tuple[int, int], width: int, seed: int) -> RealFakeClassifier:
    """An untrained classifier; the seed decides its weights, global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        seed_globally(seed)
        return RealFakeClassifier(image_size, width)


def smoothed_loss(log_odds: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy with label smoothing (arXiv 1512.00567, section 7): labels y become y (1 - s) + s / 2."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return functional.binary_cross_entropy_with_logits(log_odds, targets)


def accuracy(log_odds: Tensor, labels: Tensor) -> float:
    """Share of log-odds [N] on the side of their labels [N], 0 or 1."""
    return (log_odds > 0).eq(labels > 0.5).double().mean().item()


def calibration_error(log_odds: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error (arXiv 1706.04599, equation 3) of the probability of being real.

    The mean over equal bins of [0, 1], weighted by how many fall into each, of |share of real ones - mean probability|;
    0 is perfect, 1 the worst.
    """
    probabilities = log_odds.double().sigmoid()
    places = (probabilities * bins).long().clamp(max=bins - 1)
    excess = torch.zeros(bins, dtype=torch.float64).index_add_(0, places, labels.double() - probabilities)
    return excess.abs().sum().item() / len(labels)


def save_classifier(path: Path, classifier: RealFakeClassifier, heldout: Mapping[str, float]) -> None:
    """Write a classifier, with what it reached on held-out images.

    Raises:
        InputError: it cannot be written.
    """
    state = {
        "format": FORMAT,
        "image_size": list(classifier.image_size),
        "width": classifier.width,
        "weights": {name: value.cpu() for name, value in classifier.state_dict().items()},
        "heldout": dict(heldout),
    }
    write_tensors(path, state)


def load_classifier(path: Path, key: str, device: torch.device) -> RealFakeClassifier:
    """Read a classifier, frozen, onto a device; `key` names it in messages.

    Raises:
        InputError: it is missing, corrupt, or of another architecture (the differences are listed).
    """
    if not path.is_file():
        raise InputError(f"{key}={path}: there is no such reward model; {MAKE_ONE}")
    state = read_tensors(path, "reward model")
    weights = _weights_of(state, path)
    classifier = _described(state, weights, path)
    fill(classifier, weights, path, assign=True)
    return classifier.requires_grad_(False).eval().to(device)


def _weights_of(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("weights"), dict):
        found = ", ".join(sorted(map(str, state))[:5]) if isinstance(state, dict) else type(state).__name__
        raise InputError(
            f"{path}: is no reward model of this project in format {FORMAT}: it should hold format, image_size, width "
            f"and weights, and holds {found}; {MAKE_ONE}"
        )
    if not all(isinstance(weight, Tensor) for weight in state["weights"].values()):
        raise InputError(f"{path}: is no reward model: its weights are no tensors; {MAKE_ONE}")
    return {str(name): weight.to(torch.float32) for name, weight in state["weights"].items()}


def _described(state: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> RealFakeClassifier:
    """A classifier of the architecture that a file describes, still without weights."""
    try:
        height, width = state["image_size"]
        if not all(type(number) is int and 0 < number < LARGEST_SIZE for number in (height, width, state["width"])):
            raise ValueError(f"image_size and width must be whole numbers from 1 to {LARGEST_SIZE - 1}")
        return skeleton(lambda: RealFakeClassifier((height, width), state["width"]), weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: describes no reward model: {first_line(error)}") from error
