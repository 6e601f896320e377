"""What the preference reward learns from: captions that are nearly right, and images that are nearly good.

Wrong captions change one attribute or a number in a scene, exchange attributes between its groups, turn its relation
round, or name another background. Whatever a caption leaves open, no image shows it and the wrong one.
Worse images show what few-step samplers do: wobbly outlines, blur, two scenes at once, lost and surplus parts, noise,
colours overshot by guidance. Each comes in two severities, so that the reward learns an order and not only a verdict.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from models.shapes.scenes import ATTRIBUTES, BACKGROUNDS, MOST_OBJECTS, PATTERNS, RELATIONS, Group, Scene, impossible


def _other(names: tuple[str, ...], name: str, random: np.random.Generator) -> str:
    return str(random.choice([other for other in names if other != name]))


def _with_group(scene: Scene, index: int, **changes: str | int | None) -> Scene:
    group = replace(scene.groups[index], **changes)
    return replace(scene, groups=(*scene.groups[:index], group, *scene.groups[index + 1 :]))


def change_attribute(scene: Scene, random: np.random.Generator) -> Scene:
    """Another value for one named attribute of one group; a scene that names none stays."""
    named = [(index, name) for index, group in enumerate(scene.groups) for name in ATTRIBUTES if getattr(group, name)]
    if not named:
        return scene
    index, name = named[random.integers(len(named))]
    return _with_group(scene, index, **{name: _other(ATTRIBUTES[name], getattr(scene.groups[index], name), random)})


def change_number(scene: Scene, random: np.random.Generator) -> Scene:
    """One object or two more or fewer in one group."""
    index = int(random.integers(len(scene.groups)))
    number = scene.groups[index].number + int(random.choice([-2, -1, 1, 2]))
    return _with_group(scene, index, number=number) if 1 <= number <= MOST_OBJECTS else scene


def exchange_attribute(scene: Scene, random: np.random.Generator) -> Scene:
    """Two groups exchange one attribute in which they differ; a scene without such groups stays."""
    differing = [
        (first, second, name)
        for first, second in combinations(range(len(scene.groups)), 2)
        for name in ATTRIBUTES
        if getattr(scene.groups[first], name) != getattr(scene.groups[second], name)
    ]
    if not differing:
        return scene
    first, second, name = differing[random.integers(len(differing))]
    one, other = getattr(scene.groups[first], name), getattr(scene.groups[second], name)
    return _with_group(_with_group(scene, first, **{name: other}), second, **{name: one})


def change_relation(scene: Scene, random: np.random.Generator) -> Scene:
    """Another relation; a scene without one stays."""
    if scene.relation is None:
        return scene
    return replace(scene, relation=_other(tuple(RELATIONS), scene.relation, random))


def change_background(scene: Scene, random: np.random.Generator) -> Scene:
    """Another colour of the background, where one is named."""
    if scene.background is None:
        return scene
    return replace(scene, background=_other(tuple(BACKGROUNDS), scene.background, random))


def change_pattern(scene: Scene, random: np.random.Generator) -> Scene:
    """Another pattern of the background, where one is named."""
    return scene if scene.pattern is None else replace(scene, pattern=_other(PATTERNS, scene.pattern, random))


# What holds for few scenes, or is hard to see, is tried more often.
CHANGES = (
    *(2 * (change_attribute,)),
    change_number,
    *(2 * (exchange_attribute,)),
    *(4 * (change_relation,)),
    change_background,
    *(4 * (change_pattern,)),
)


def contradicts(scene: Scene, other: Scene) -> bool:
    """Whether no image shows both scenes, in whatever way the attributes that they leave open are filled in."""
    if scene.number_of_objects != other.number_of_objects:
        return True
    if _differ(scene.background, other.background) or _differ(scene.pattern, other.pattern):
        return True
    members, others = ([group for group in each.groups for _ in range(group.number)] for each in (scene, other))
    alike = np.array([[_may_be_alike(one, another) for another in others] for one in members])
    if scene.relation is None or other.relation is None:
        return not alike[linear_sum_assignment(alike, maximize=True)].all()
    (x, y), direction = RELATIONS[scene.relation], RELATIONS[other.relation]
    in_order = alike[0, 0] and alike[1, 1] and direction == (x, y)
    turned_round = alike[0, 1] and alike[1, 0] and direction == (-x, -y)
    return not (in_order or turned_round)


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other


def _may_be_alike(one: Group, other: Group) -> bool:
    return not any(_differ(getattr(one, name), getattr(other, name)) for name in ATTRIBUTES)


def wrong_scene(scene: Scene, random: np.random.Generator) -> Scene:
    """A scene that differs from the given one in one respect and contradicts it, without compositions of another split
    than its own and train.
    """
    while True:
        changed = CHANGES[random.integers(len(CHANGES))](scene, random)
        if contradicts(scene, changed) and impossible(changed) is None and changed.split() in ("train", scene.split()):
            return changed


# --------------------------------------------------------------------------------------------------------------------
# Worse images. Each takes images [N, 3, H, W] in [0, 1], severity [N, 1, 1, 1] in [0, 1], other images to borrow
# from, and noise sources.


def _wobble(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Outlines displaced by a smooth random field of up to about 5 pixels."""
    number, _, height, width = images.shape
    coarse = torch.randn(number, 2, 8, 8, generator=generator)
    field = functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    shift = field * (0.8 + 3.2 * severity) * 2 / width  # [N, 2, H, W] in units of half the image
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([columns, rows]) + shift
    return functional.grid_sample(images, grid.movedim(1, -1), padding_mode="border", align_corners=True)


def _blur(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A mixture with a strongly blurred copy."""
    small = functional.interpolate(images, scale_factor=0.2, mode="bilinear", antialias=True)
    blurred = functional.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return torch.lerp(images, blurred, 0.25 + 0.75 * severity)


def _ghost(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A second scene shines through."""
    return torch.lerp(images, others, 0.12 + 0.48 * severity)


def _windows(images: Tensor, generator: torch.Generator, size: Tensor) -> Tensor:
    """Random square windows [N, 1, H, W] of a size [N, 1, 1, 1] in pixels, as masks."""
    number, _, height, width = images.shape
    centres = 12 + torch.rand(number, 2, 1, 1, generator=generator) * (height - 24)
    rows, columns = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    inside = ((rows - centres[:, :1]).abs() < size / 2) & ((columns - centres[:, 1:]).abs() < size / 2)
    return inside.to(images.dtype)


def _lost_part(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A window falls back to the background, taken from the top left pixel."""
    return torch.lerp(images, images[:, :, :1, :1], _windows(images, generator, 10 + 18 * severity))


def _surplus_part(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A window of another scene."""
    return torch.lerp(images, others, _windows(images, generator, 10 + 18 * severity))


def _noise(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Coarse coloured noise, as an unfinished latent decodes to."""
    number, channels, height, width = images.shape
    coarse = torch.randn(number, channels, height // 4, width // 4, generator=generator)
    noise = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return images + (0.04 + 0.22 * severity) * noise


def _overshoot(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and saturation pushed away from the image's mean, as a too strong guidance does, or drained."""
    gain = torch.where(
        torch.rand(severity.shape, generator=generator) < 0.7, 1.25 + 1.2 * severity, 0.8 - 0.5 * severity
    )
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + gain * (images - mean)


def _tint(images: Tensor, severity: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth cast of a random colour."""
    cast = functional.interpolate(
        torch.randn(len(images), 3, 3, 3, generator=generator),
        size=images.shape[-2:],
        mode="bicubic",
        align_corners=False,
    )
    return images + (0.06 + 0.2 * severity) * cast


CORRUPTIONS = (_wobble, _wobble, _blur, _ghost, _lost_part, _surplus_part, _noise, _overshoot, _tint)


def worse_images(images: Tensor, severity: Tensor, kind: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Corrupt each image in its own way.

    Args:
        images: [N, 3, H, W] in [0, 1].
        severity: [N] in [0, 1]; 0 is visible already.
        kind: [N], numbers of `CORRUPTIONS`.
        others: [N, 3, H, W], images of other scenes.
        generator: the only source of randomness.

    Returns:
        [N, 3, H, W] in [0, 1].
    """
    worse = images.clone()
    for number, corrupt in enumerate(CORRUPTIONS):
        rows = (kind == number).nonzero().flatten()
        if len(rows) > 0:
            worse[rows] = corrupt(images[rows], severity[rows].view(-1, 1, 1, 1), others[rows], generator)
    return worse.clamp(0, 1)
