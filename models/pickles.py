"""Reading pickles without running them.

A pickle is a program. Here its opcodes are looked at one after another (pickletools); the few that plain data and
tensors are written with are carried out on plain containers, and the first other one ends the reading. What a name in a
pickle stands for is decided by whoever asks for the reading: nothing is imported.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from errors import InputError

DEEPEST = 100  # levels of containers in containers

STORAGES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "torch.BoolStorage": torch.bool,
        "torch.ByteStorage": torch.uint8,
        "torch.CharStorage": torch.int8,
        "torch.ShortStorage": torch.int16,
        "torch.IntStorage": torch.int32,
        "torch.LongStorage": torch.int64,
        "torch.HalfStorage": torch.float16,
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.FloatStorage": torch.float32,
        "torch.DoubleStorage": torch.float64,
        "torch.ComplexFloatStorage": torch.complex64,
        "torch.ComplexDoubleStorage": torch.complex128,
        "torch.storage.UntypedStorage": torch.uint8,
    }
)
"""By what names torch's pickles call the types of numbers."""

# Of protocols 2 to 5, what holds its value itself; nothing of 4 GB, no buffer outside the pickle.
_VALUE = re.compile("BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BIN(UNICODE|BYTES)")
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class StandIn:
    """Takes the place of an object: accepts any arguments, and does no more with its state than to keep it."""

    state: object = None

    def __init__(self, *_: object) -> None:
        """Whatever it is given, it makes nothing of it."""

    def __call__(self, *_: object) -> StandIn:
        """What a method of the object would have given: nothing either."""
        return StandIn()


class PickleReader:
    """Reads one pickle.

    Args:
        resolve: (module, name) -> what stands for it, a function that is safe to call with anything, or a mere token.
        persistent: description of an object that is kept outside the pickle -> what stands for it.
        most: opcodes; a pickle with more of them is refused.
    """

    def __init__(
        self, resolve: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None = None, *, most: int
    ) -> None:
        """Nothing is read yet; see the class."""
        self._resolve, self._persistent, self._most = resolve, persistent, most
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """The object that the pickle describes; `file` is read up to the pickle's end.

        Raises:
            pickle.UnpicklingError: it is cut off or forged, or uses what neither data nor tensors need.
            InputError: from `resolve`.
        """
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if opcode.name == "STOP":
                    return self._stack.pop()
                if number == self._most:
                    raise pickle.UnpicklingError(f"it has more than {self._most:,} opcodes")
                self._carry_out(opcode.name, argument)
        except (InputError, pickle.UnpicklingError):
            raise
        except Exception as error:  # what a forged pickle makes the machine trip over can be anything
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error

    def _carry_out(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(self._stack))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS" | "BUILD":
                parts = self._taken(self._marks.pop() if name.endswith("S") else -2 if name == "SETITEM" else -1)
                _fill(self._stack[-1], name.rstrip("S"), parts)
            case _:
                self._stack.append(self._made(name, argument))

    def _made(self, name: str, argument: Any) -> Any:
        """What an opcode pushes."""
        match name:
            case _ if _VALUE.fullmatch(name):
                return argument
            case _ if name in _CONSTANTS:
                return _CONSTANTS[name]()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self._taken(-int(name[-1])))
            case "TUPLE":
                return tuple(self._taken(self._marks.pop()))
            case "BINGET" | "LONG_BINGET":
                return self._memo[argument]
            case "GLOBAL":
                return self._named(*argument.split(" "))
            case "STACK_GLOBAL":
                return self._named(*self._taken(-2))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._taken(-2)
                return function(*arguments)
            case "BINPERSID" if self._persistent is not None:
                return self._persistent(self._stack.pop())
            case _:
                raise pickle.UnpicklingError(f"it uses the opcode {name}, which neither data nor tensors need")

    def _named(self, module: str, name: str) -> Any:
        if not all(part.isidentifier() for part in f"{module}.{name}".split(".")):
            raise pickle.UnpicklingError("it names what can be no name")
        return self._resolve(module, name)

    def _taken(self, start: int) -> list[Any]:
        """What lies on the stack from `start` on (negative: counted from its top), no longer there."""
        if len(self._stack) < abs(start):
            raise IndexError("it takes more than it has made")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken


def _fill(target: Any, name: str, parts: list[Any]) -> None:
    """Put parts into a container, or into a stand-in, which keeps its state alone."""
    match name, target:
        case "BUILD", StandIn():
            target.state = parts[0]
        case ("APPEND", list()):
            target.extend(parts)
        case ("SETITEM", dict()):
            target.update(zip(plain_keys(parts[::2]), parts[1::2], strict=True))
        case ("ADDITEM", set()):
            target.update(plain_keys(parts))
        case ("SETITEM" | "APPEND", StandIn()) | ("BUILD", dict()):
            pass
        case _:
            raise TypeError(f"{name} into a {type(target).__name__}")


def plain_keys(keys: Sequence[Any]) -> Sequence[Any]:
    """The keys; none may be a nested tuple, as to hash tuples of shared tuples can take for ever."""
    if any(isinstance(part, tuple) for key in keys if isinstance(key, tuple) for part in key):
        raise pickle.UnpicklingError("it has nested tuples for keys")
    return keys


def plain_dict(pairs: Sequence[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Stands for dict and its kin."""
    return dict(zip(plain_keys([key for key, _ in pairs]), [value for _, value in pairs], strict=True))


def plain_set(items: Sequence[Any] = ()) -> set[Any]:
    """Stands for set."""
    return set(plain_keys(items))


def require_tree(value: Any, *, most: int) -> None:
    """Raise pickle.UnpicklingError where a walk through nested containers would not end, or not soon.

    They may be `DEEPEST` levels deep, with `most` entries on each; what is shared counts each time that it is met.
    """
    level = [value]
    for _ in range(DEEPEST):
        level = list(islice((part for entry in level for part in _parts(entry)), most + 1))
        if not level:
            return
        if len(level) > most:
            raise pickle.UnpicklingError(f"it holds more than {most:,} entries")
    raise pickle.UnpicklingError(f"it is nested more than {DEEPEST} levels deep, or holds itself")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple | set) else ()
