"""The processes of a command, one for each device."""

from __future__ import annotations

import os
import threading
import time

from lightning.fabric import Fabric

from models.devices import resolve_device

PATIENCE = 5  # seconds between two looks at whether the first process is there


def fabric_of(device: str, num_devices: int = 1, num_nodes: int = 1) -> Fabric:
    """Lightning's Fabric for so many devices, each with a process of its own; call `launch` on it.

    Raises:
        InputError: there is no such device.
    """
    found = resolve_device(device)
    several = num_devices * num_nodes > 1
    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    one = [found.index] if found.index is not None and not several else num_devices
    return Fabric(accelerator=found.type, devices=one, num_nodes=num_nodes, strategy="ddp" if several else "auto")


def _end_with(parent: int) -> None:
    """End this process when the one that started it has: in a collective with that one it may wait for very long."""
    while os.getppid() == parent:
        time.sleep(PATIENCE)
    os.write(2, b"the process that started this one has ended, and so does this one\n")
    os._exit(1)
