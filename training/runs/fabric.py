"""The processes of a command, one for each device."""

from __future__ import annotations

from lightning.fabric import Fabric

from models.devices import resolve_device


def fabric_of(device: str, num_devices: int = 1, num_nodes: int = 1) -> Fabric:
    """Lightning's Fabric for so many devices, each with a process of its own; call `launch` on it.

    Raises:
        InputError: there is no such device.
    """
    found = resolve_device(device)
    several = num_devices * num_nodes > 1
    one = [found.index] if found.index is not None and not several else num_devices
    return Fabric(accelerator=found.type, devices=one, num_nodes=num_nodes, strategy="ddp" if several else "auto")
