"""Searches for a better solver, one module each, behind one protocol: `search.method` names the module."""

from __future__ import annotations

import importlib
from typing import cast

from errors import InputError
from training.ppo.search.protocol import Method, Policy, Search

__all__ = ["Method", "Policy", "Search", "method_called"]


def method_called(name: str) -> Method:
    """The module of a method in `training.ppo.config.METHODS`.

    Raises InputError where a package that it needs is not there.
    """
    try:
        return cast(Method, importlib.import_module(f"{__name__}.{name}"))
    except ModuleNotFoundError as error:
        raise InputError(f"search.method={name} needs the package {error.name}: pip install {error.name}") from None
