"""Devices and number types by the names that command lines take, and the memory of devices."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from errors import InputError

MEMORY_OF_MACHINE = Path("/proc/meminfo")
# Where a container sees its own control group.
MEMORY_OF_CONTAINER = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve_device(name: str) -> torch.device:
    """`auto` (cuda where it is there, else cpu), `cpu`, `cuda`, `cuda:<index>` or `mps`, as a device that can be used.

    Metal is never chosen by itself: it has no float64, so noise levels must stay on the CPU there. Raises `InputError`
    for an unknown name and for a device this machine does not have.
    """
    if fault := device_fault(name):
        raise InputError(fault)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"Device {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices here.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("Device 'mps' asked for, but torch finds no Metal device here. Use cpu or auto.")
    return torch.device(name)


def device_fault(name: str) -> str | None:
    """What is wrong with a device's name, whatever this machine has; None where it is one."""
    kind, _, index = name.partition(":")
    if name in ("auto", "cpu", "mps") or (kind == "cuda" and (index.isdecimal() or name == kind)):
        return None
    meant = f" Did you mean {name.replace(kind, 'cuda', 1)}?" if kind == "gpu" else ""
    return f"Unknown device {name!r}. Known: auto, cpu, cuda, cuda:<index>, mps.{meant}"


def check_compiler(device: torch.device) -> None:
    """Raise `InputError` where torch.compile would find no compiler for what it writes for `device`.

    For a CPU it writes C++; for CUDA Triton builds a launcher in C.
    """
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    wanted = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in wanted):
        raise InputError(
            f"torch.compile needs a compiler for {device}, and {' or '.join(wanted)} is not there: install one, name "
            f"another in the environment variable {variable}, or do without compiling."
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; to a CUDA device through pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be asked for, on the CPU without swapping; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMORY_OF_MACHINE.read_text(), re.MULTILINE)
    except OSError:
        return None
    limits = [int(found[1]) * 1024] if found else []
    limits += [left for folder in MEMORY_OF_CONTAINER if (left := _left_in(folder)) is not None]
    return min(limits, default=None)


def _left_in(container: Path) -> int | None:
    """Bytes left below the memory limit of a control group, what it caches of files counted as free; None: no limit."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        try:
            allowed, taken = (int((container / name).read_text()) for name in (limit, used))
            found = re.search(rf"^{cached} (\d+)$", (container / "memory.stat").read_text(), re.MULTILINE)
        except (OSError, ValueError):  # not there, or "max"
            continue
        return max(0, allowed - taken + (int(found[1]) if found else 0))
    return None


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise `InputError` where `needed` bytes more do not fit on the device; `what` needs them."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise InputError(
            f"{what} needs {gigabytes(needed)} of memory on {device}, {gigabytes(free)} are free: end what else runs "
            "there, choose another device, or half precision (bfloat16 takes half of what float32 takes)."
        )


def gigabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.1f} GB"
