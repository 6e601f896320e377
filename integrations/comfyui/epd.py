"""Solvers tuned by RLEPD in ComfyUI's terms: `model(x, sigma, **extra) -> denoised`. Needs torch only.

With a = σ_i and b = σ_{i+1}, r, w, o, s, h and q from row i of the columns positions, weights, scale_dir, scale_time,
history and direction_history, an interval is

    D̄_i = D_i + Σ_j h_j (D_j - D_i)                     D_i = D(x, a), the denoised estimate
    c_i = (x - D̄_i) / a,    d = c_i + Σ_j q_j (c_j - c_i)
    x_k = x + (τ_k - a) d,  τ_k = b^r_k · a^(1 - r_k)
    d_k = (x_k - D(x_k, s_k τ_k)) / τ_k
    x  <- x + (b - a) Σ_k w_k o_k d_k                   without points, K = 0:  x <- x + (b - a) d

after arXiv 2507.14797 and 2512.22796.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

GUIDANCE = "epd_guidance"
"""Under this key of `model_options` a model is told the guidance scale of each of its rows, a list."""

# What our network-snapshot-*.json calls otherwise, its versions that are read, and the checksum of all else in it.
SNAPSHOT_KEYS = {"positions": "r", "weights": "w"}
SNAPSHOT_VERSIONS = (1, 2)
CHECKSUM = "sha256"


@dataclass(frozen=True)
class Solver:
    """A solver of S intervals and K points.

    sigmas: [S + 1], descending. The other columns are float64 [S, K]; guidance [S][1 + K], or None where
    `guidance_scale` serves all; that is None where nothing says it. history, direction_history: [S][S].
    """

    sigmas: list[float]
    positions: Tensor
    weights: Tensor
    scale_dir: Tensor
    scale_time: Tensor
    guidance: list[list[float]] | None
    history: list[list[float]]
    direction_history: list[list[float]]
    guidance_scale: float | None

    @property
    def intervals(self) -> int:
        """S."""
        return len(self.sigmas) - 1


def read_solver(path: str | Path) -> Solver:
    """Read a solver from the scheduler_config.json of an export for diffusers, or from a network-snapshot-*.json.

    Raises ValueError for a file that holds none, is damaged, or whose noise levels only a model could tell.
    """
    try:
        return _solver(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: holds no solver ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _solver(said: dict[str, Any]) -> Solver:
    recorded = said.pop(CHECKSUM, None)
    if recorded is not None and recorded != hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest():
        raise ValueError(f"is damaged: its content is not that of its {CHECKSUM}; copy or download it anew")
    if said.get("version", 1) not in SNAPSHOT_VERSIONS:
        raise ValueError(f"has version {said['version']!r}, of a later RLEPD: install its nodes")
    metadata = said.get("metadata", said)
    sigmas, scale = metadata.get("sigmas"), metadata.get("guidance_rate", metadata.get("guidance_scale"))
    if scale is not None and not _is_number(scale):
        raise ValueError(f"its guidance scale {scale!r} is no finite number")
    if metadata.get("afs"):
        raise ValueError("takes its first direction without asking the network (AFS), which is not played here")
    if sigmas is None or (metadata.get("sampler_stu") == "ipndm" and said.get("direction_history") is None):
        raise ValueError(
            "does not list all its numbers; take the scheduler_config.json that python -m scripts.export_diffusers "
            "writes of it"
        )
    if len(sigmas) < 2 or not all(math.inf > a > b > 0 for a, b in pairwise(sigmas)):
        raise ValueError("sigmas must be at least two positive numbers, each below the one before")
    count = len(sigmas) - 1
    points = len((said.get("positions") or said.get("r") or [[]])[0])

    def column(name: str, width: int, neutral: float) -> Tensor:
        rows = said.get(SNAPSHOT_KEYS.get(name, name), said.get(name))
        if rows is None or not width:
            return torch.full((count, width), neutral, dtype=torch.float64)
        numbers = [number for row in rows for number in row]
        if [len(row) for row in rows] != [width] * count or not all(map(_is_number, numbers)):
            raise ValueError(f"{name} must be {count} rows of {width} numbers, all finite")
        return torch.tensor(rows, dtype=torch.float64)

    return Solver(
        sigmas=[float(level) for level in sigmas],
        positions=column("positions", points, 0.0),
        weights=column("weights", points, 0.0),
        scale_dir=column("scale_dir", points, 1.0),
        scale_time=column("scale_time", points, 1.0),
        guidance=None if said.get("guidance") is None else column("guidance", 1 + points, 1.0).tolist(),
        history=column("history", count, 0.0).tolist(),
        direction_history=column("direction_history", count, 0.0).tolist(),
        guidance_scale=scale,
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def first_interval(solver: Solver, sigmas: Tensor) -> int:
    """The interval in which a run down these noise levels begins; they must be the solver's, or some in a row."""
    given = sigmas.tolist()
    for start in range(len(solver.sigmas) - len(given) + 1):
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(given, solver.sigmas[start:], strict=False)):
            return start
    raise ValueError(
        f"the solver has noise levels of its own, {[float(f'{level:.4g}') for level in solver.sigmas]}: sample at "
        "these, or at some of them in a row (EPD Sigmas, SplitSigmas)"
    )


@torch.no_grad()
def sample_epd(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    solver: Solver,
    at_once: bool = True,
) -> Tensor:
    """From the state x [B, ...] at sigmas[0] to that at sigmas[-1], as samplers of k-diffusion are called.

    `at_once`: all points of an interval are one call of K·B rows, point-major (row k·B + b is point k of sample b), for
    ComfyUI repeats a conditioning of B rows as a whole. With a mask of what is kept, which has B rows, they are K
    calls, as they are otherwise: slower, with less memory, and the same result.
    """
    extra = dict(extra_args or {})
    at_once = at_once and extra.get("denoise_mask") is None
    estimates: list[tuple[int, Tensor]] = []
    directions: list[tuple[int, Tensor]] = []

    def asked(x: Tensor, levels: list[float], i: int, evaluations: slice) -> Tensor:
        """D of the rows x, which are as many for each level; `evaluations` of the interval's 1 + K."""
        each = len(x) // len(levels)
        told = torch.tensor(levels, dtype=torch.float32, device=x.device).repeat_interleave(each)
        if solver.guidance is None:
            return model(x, told, **extra)
        scales = [scale for scale in solver.guidance[i][evaluations] for _ in range(each)]
        return model(x, told, **{**extra, "model_options": {**extra.get("model_options", {}), GUIDANCE: scales}})

    start = first_interval(solver, sigmas)
    for step in trange(len(sigmas) - 1, disable=disable):
        i = start + step
        a, b = solver.sigmas[i : i + 2]
        denoised = asked(x, [a], i, slice(1))
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
        slope = (x - _recalling(solver.history[i], i, denoised, estimates)) / a
        direction = _recalling(solver.direction_history[i], i, slope, directions)
        points = (b ** solver.positions[i] * a ** (1 - solver.positions[i])).tolist()
        if not points:
            x = x + (b - a) * direction
            continue
        told = (torch.tensor(points, dtype=torch.float64) * solver.scale_time[i]).tolist()
        shares = (solver.weights[i] * solver.scale_dir[i]).tolist()
        states = [x + (point - a) * direction for point in points]
        if at_once:
            answers = asked(torch.cat(states), told, i, slice(1, None)).chunk(len(points))
        else:
            answers = [asked(state, [told[k]], i, slice(k + 1, k + 2)) for k, state in enumerate(states)]
        for point, share, state, answer in zip(points, shares, states, answers, strict=True):
            x = x + (b - a) * share / point * (state - answer)
    return x


def guided_by_row(model_options: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """One scale for the call, and options under which each row is guided at its own scale.

    ComfyUI leaves out what goes without the text where the scale is 1: so it is where all rows' scales are 1.
    """
    scales = model_options[GUIDANCE]
    one = next((scale for scale in scales if not math.isclose(scale, 1.0)), 1.0)
    if all(scale == one for scale in scales):
        return one, dict(model_options)
    own = model_options.get("sampler_cfg_function", _cfg)

    def cfg(arguments: dict[str, Any]) -> Tensor:
        rows = arguments["cond"].new_tensor(scales).view(-1, *[1] * (arguments["cond"].ndim - 1))
        return own({**arguments, "cond_scale": rows})

    return one, {**model_options, "sampler_cfg_function": cfg}


def _cfg(arguments: Mapping[str, Any]) -> Tensor:
    return arguments["uncond"] + (arguments["cond"] - arguments["uncond"]) * arguments["cond_scale"]


def _recalling(row: list[float], i: int, own: Tensor, earlier: list[tuple[int, Tensor]]) -> Tensor:
    """y_i + Σ_j row_j (y_j - y_i) over the intervals that were run; keeps y_i = own for those that follow."""
    found = own
    for j, other in earlier:
        if row[j]:
            found = found + row[j] * (other - own)
    earlier.append((i, own))
    return found
