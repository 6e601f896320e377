"""How rewards are named in configurations and on command lines."""

from __future__ import annotations

import re
from pathlib import Path

FUNCTION = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)")
"""A function, or a class, of the user's own: `my_module:my_reward`, `package.module:my_reward`."""


def reward_name(reward: str | Path) -> str:
    """What a reward is called in logs and tables: its own name, its function's, or that of its file without suffix."""
    found = FUNCTION.fullmatch(str(reward))
    return found["name"] if found else Path(reward).stem
