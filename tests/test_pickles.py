"""Pickles read opcode by opcode: what pickle writes comes back, and nothing else is carried out."""

import io
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pickles import PickleReader, StandIn, plain_dict, require_tree

NUMBERS = st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
SCALARS = st.none() | NUMBERS | st.text() | st.binary()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def read(content, resolve=None, **limits):
    return PickleReader(resolve, **{"most": 10_000, **limits}).load(io.BytesIO(content))


@given(value=PLAIN, protocol=st.integers(3, 5))
@settings(max_examples=200, deadline=None)
def test_plain_data_comes_back_as_it_was_pickled(value, protocol):
    assert read(pickle.dumps(value, protocol=protocol)) == value


def test_what_is_shared_is_shared_and_names_are_answered_by_the_caller():
    inner = OrderedDict(a=[1])
    asked = []

    def resolve(module, name):
        asked.append(f"{module}.{name}")
        return plain_dict

    first, second = read(pickle.dumps([inner, inner]), resolve)
    assert first is second
    assert first == {"a": [1]}
    assert asked == ["collections.OrderedDict"]


def test_a_stand_in_keeps_its_state():
    made = read(pickle.dumps(SimpleNamespace(a=1)), lambda module, name: StandIn)
    assert isinstance(made, StandIn)
    assert made.state == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]q\x00h\x01.",  # what was never kept
        b"\x80\x02e.",  # a mark that was never set
        b"\x80\x02.",
        b"\x80\x02]",
        b"\x80\x02]K\x01",
        b"\x80\x02(i" + b"os\nsystem\n.",
        b"\x80\x02\x82\x01.",  # a class out of a registry
        b"P1\n.",
        b"\x80\x05\x97.",  # a buffer from elsewhere
        b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
        b"\x80\x04X\x01\x00\x00\x00aX\x02\x00\x00\x00b\n\x93.",  # a name of two lines
        b"\x80\x02}]K\x01s.",  # a list for a key
        b"\x80\x02K\x01K\x02a.",  # into a number
        b"\x80\x02K\x01)R.",  # a number called
        b"\x80\x02" + b"]" * 20_000 + b".",
    ],
)
def test_what_neither_data_nor_tensors_need_is_refused(content):
    with pytest.raises(pickle.UnpicklingError):
        read(content)


def test_keys_that_take_for_ever_to_hash_are_refused():
    doubled = b")" + b"q\x00h\x00\x86" * 60
    with pytest.raises(pickle.UnpicklingError, match="nested tuples"):
        read(b"\x80\x02}" + doubled + b"K\x01s.")
    assert read(pickle.dumps({(1, 2): 3})) == {(1, 2): 3}


def holding_itself():
    value = []
    value.append({"again": value})
    return value


def shared(levels):
    value = [1]
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize("value", [holding_itself(), shared(12), [0] * 1001])
def test_a_walk_that_would_not_end_is_refused(value):
    with pytest.raises(pickle.UnpicklingError, match="holds"):
        require_tree(value, most=1000)


def test_a_walk_that_ends_is_not():
    require_tree([{"a": (1, [2])}, *range(900)], most=1000)
