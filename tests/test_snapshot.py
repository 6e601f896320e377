"""Snapshots: exact round trips, the public code base's own format, and files that are refused before anything runs."""

import io
import json
import math
import os
import pickle
import random
import sys
import tracemalloc
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from models.digests import digest_of, record_digest
from solvers import EPDTable
from tests import golden
from training.networks import EPD_predictor
from training.snapshot import find_snapshot, load_snapshot, save_snapshot

FIELDS = ("positions", "weights", "scale_dir", "scale_time")
METADATA = {"dataset_name": "shapes", "guidance_rate": 7.5, "M": 3, "afs": False, "backend_config": {"resolution": 64}}


def _table(seed=0, shape=(3, 2), scales=True):
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    weights = uniform(0.1, 1)
    return EPDTable(
        positions=uniform(0.01, 0.99),
        weights=weights / weights.sum(-1, keepdim=True),
        scale_dir=uniform(0.97, 1.03) if scales else None,
        scale_time=uniform(0.9, 1.1) if scales else None,
    )


def _assert_equal(one, other, tolerance=0.0):
    for field in FIELDS:
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=tolerance)


@given(seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 6), st.integers(1, 4)), scales=st.booleans())
@settings(max_examples=30, deadline=None)
def test_either_file_of_a_pair_reads_back_exactly(tmp_path_factory, seed, shape, scales):
    path = tmp_path_factory.mktemp("pair") / "network-snapshot-000001.pkl"
    table = _table(seed, shape, scales)
    assert save_snapshot(path, table, METADATA) == path
    for file in (path, path.with_suffix(".json")):
        read, metadata = load_snapshot(file)
        _assert_equal(read, table)
        assert METADATA.items() <= metadata.items()
        assert (metadata["num_steps"], metadata["num_points"]) == (shape[0] + 1, shape[1])


def test_each_file_reads_alone(tmp_path):
    table = _table()
    path = save_snapshot(tmp_path / "snapshot", table, METADATA)
    both = load_snapshot(path)[1]
    path.with_suffix(".json").rename(tmp_path / "other.json")
    read, metadata = load_snapshot(path)
    _assert_equal(read, table, tolerance=5e-7)  # the .pkl holds float32 parameters
    assert metadata == both
    read, metadata = load_snapshot(tmp_path / "other.json")
    _assert_equal(read, table)
    assert metadata == both


def test_a_plain_unpickler_finds_what_the_public_code_base_uses(tmp_path):
    table = _table()
    path = save_snapshot(tmp_path / "snapshot.pkl", table, METADATA)
    model = pickle.loads(path.read_bytes())["model"]
    assert (type(model).__module__, type(model).__qualname__) == ("training.networks", "EPD_predictor")
    assert (model.num_steps, model.num_points, model.guidance_rate, model.backend_config) == (
        4,
        2,
        7.5,
        {"resolution": 64},
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    # the public forward, for one interval
    torch.testing.assert_close(model.sigmoid(model.r_params[1]).double(), table.positions[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.softmax(model.weight_s[1]).double(), table.weights[1], rtol=1e-5, atol=1e-6)
    scale = 2 * model.sigmoid(0.5 * model.scale_dir_params[1]) * model.scale_dir + (1 - model.scale_dir)
    torch.testing.assert_close(scale.double(), table.scale_dir[1], rtol=1e-5, atol=1e-6)


def test_saving_replaces_the_pair_and_leaves_nothing_else(tmp_path):
    save_snapshot(tmp_path / "snapshot.pkl", _table(1), METADATA)
    save_snapshot(tmp_path / "snapshot.pkl", _table(2), METADATA)
    _assert_equal(load_snapshot(tmp_path / "snapshot.pkl")[0], _table(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["snapshot.json", "snapshot.pkl"]


def test_weights_that_sum_to_one_only_nearly_still_make_an_agreeing_pair(tmp_path):
    table = EPDTable(_table().positions, torch.full((3, 2), 0.5 + 4.9e-6, dtype=torch.float64))
    path = save_snapshot(tmp_path / "snapshot.pkl", table, {})
    _assert_equal(load_snapshot(path)[0], table)


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.zeros(1), {1: 2}, [object()]])
def test_metadata_that_is_not_plain_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="metadata 'odd'"):
        save_snapshot(tmp_path / "snapshot.pkl", _table(), {"odd": value})
    assert not list(tmp_path.iterdir())


def test_a_table_per_sample_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"one table \[S, K\]"):
        save_snapshot(tmp_path / "snapshot.pkl", _table().expand(3), {})


def test_a_pair_that_contradicts_itself_is_refused(tmp_path):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(1), METADATA)
    save_snapshot(tmp_path / "other.pkl", _table(2), METADATA)
    (tmp_path / "other.json").replace(tmp_path / "snapshot.json")
    for suffix in (".pkl", ".json"):
        with pytest.raises(InputError, match="contradict each other"):
            load_snapshot(path.with_suffix(suffix))


def test_a_flipped_bit_in_a_json_never_becomes_another_table(tmp_path):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA).with_suffix(".json")
    path.with_suffix(".pkl").unlink()
    table, metadata = load_snapshot(path)
    content, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        try:
            read, its = load_snapshot(path)
        except InputError:
            refused += 1
        else:
            _assert_equal(read, table)
            assert its == metadata
    assert refused > 150


@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_what_was_recorded_of_a_file_without_a_checksum_is_held_against_it(tmp_path, suffix):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA).with_suffix(suffix)
    for other in tmp_path.glob("snapshot.*"):
        if other != path:
            other.unlink()
    if suffix == ".json":
        path.write_text(json.dumps(_unchecked(json.loads(path.read_text()))))
    record_digest(path, digest_of(path))
    load_snapshot(path)
    path.write_bytes(path.read_bytes().replace(b"guidance_rate", b"guidance_rite"))
    with pytest.raises(InputError, match=rf"snapshot\{suffix} is damaged: its SHA-256 is not the one in snapshot"):
        load_snapshot(path)


def test_a_json_that_was_edited_says_how_to_keep_it(tmp_path):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA).with_suffix(".json")
    path.with_suffix(".pkl").unlink()
    described = json.loads(path.read_text())
    described["metadata"]["guidance_rate"] = 3.5
    path.write_text(json.dumps(described))
    with pytest.raises(InputError, match="edited on purpose, remove the entry sha256"):
        load_snapshot(path)
    del described["sha256"]
    path.write_text(json.dumps(described))
    assert load_snapshot(path)[1]["guidance_rate"] == 3.5


def test_a_pair_whose_metadata_differs_is_refused(tmp_path):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA).with_suffix(".json")
    described = _unchecked(json.loads(path.read_text()))
    for changed in ({"guidance_rate": 3.5}, {"guidance_rite": described["metadata"].pop("guidance_rate")}):
        path.write_text(json.dumps({**described, "metadata": {**described["metadata"], **changed}}))
        with pytest.raises(InputError, match="contradict each other"):
            load_snapshot(path)


# ------------------------------------------------------------------------------- the public code base's own format

PUBLIC_SOURCE = """
import pathlib
pathlib.Path({canary!r}).touch()
raise SystemExit("source code out of a snapshot was executed")
"""


def _reconstruct_persistent_obj(meta):
    raise AssertionError("only its name is pickled")


class EasyDict(dict):
    pass


class _Persistent:
    """Pickles as the public persistence helper makes an object do: its source, its class's name and its state."""

    def __init__(self, class_name, state, canary):
        self.class_name, self.state, self.canary = class_name, state, canary

    def __reduce__(self):
        meta = {
            "type": "class",
            "version": 6,
            "module_src": PUBLIC_SOURCE.format(canary=str(self.canary)),
            "class_name": self.class_name,
            "state": self.state,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture
def public_modules(monkeypatch):
    """Modules by the public names, there only while a test file is written."""

    def epd_sampler():
        raise AssertionError("only its name is pickled")

    epd_sampler.__module__, epd_sampler.__qualname__ = "solvers_of_the_test", "epd_sampler"
    monkeypatch.setattr(sys.modules[__name__]._reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(EasyDict, "__module__", "dnnlib.util")
    contents = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, members in contents.items():
        for package in (name.partition(".")[0], name):
            module = types.ModuleType(package)
            vars(module).update(members if package == name else {})
            monkeypatch.setitem(sys.modules, package, module)


def _public_snapshot(parameters, attributes, canary, protocol=4, wrapped=True):
    """The bytes of a snapshot as the public training loop pickles it: {"model": predictor, "loss_fn": loss}."""
    import solvers

    tensors = {name: torch.tensor(rows) for name, rows in parameters.items()}
    named = {name: torch.nn.Parameter(t) if wrapped else t for name, t in tensors.items()}
    module = torch.nn.Module()
    state = {
        **vars(module),
        "training": False,
        **attributes,
        "_parameters": OrderedDict(named),
        "_modules": OrderedDict(sigmoid=torch.nn.Sigmoid(), softmax=torch.nn.Softmax(dim=-1)),
        "_init_args": (),
        "_init_kwargs": EasyDict(attributes),
    }
    loss_state = {"M": 1, "solver_stu": solvers.epd_sampler, "t_steps": torch.linspace(14.6, 0.03, 10), "lpips": None}
    snapshot = {
        "model": _Persistent("EPD_predictor", state, canary),
        "loss_fn": _Persistent("EPD_loss", loss_state, canary),
    }
    return pickle.dumps(snapshot, protocol=protocol)


PUBLIC_PARAMETERS = {
    "r_params": [[0.3, 1.4], [-1.2, -0.1]],
    "weight_s": [[-0.3, 0.0], [1.2, 0.7]],
    "scale_dir_params": [[0.1, -0.4], [2.0, 1.0]],
    "scale_time_params": [[0.0, 0.5], [-1.0, 3.0]],
}
PUBLIC_ATTRIBUTES = {
    "num_steps": 3,
    "num_points": 2,
    "scale_dir": 0.05,
    "scale_time": 0,
    "sampler_stu": "epd",
    "fcn": False,
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("wrapped", [True, False])
def test_public_snapshots_read_and_their_source_is_not_executed(public_modules, tmp_path, protocol, wrapped):
    canary = tmp_path / "executed"
    content = _public_snapshot(PUBLIC_PARAMETERS, PUBLIC_ATTRIBUTES, canary, protocol, wrapped)
    assert b"touch()" in content
    assert b"_reconstruct_persistent_obj" in content
    path = tmp_path / "network-snapshot-000005.pkl"
    path.write_bytes(content)
    table, metadata = load_snapshot(path)
    parameters = {name: torch.tensor(rows).double() for name, rows in PUBLIC_PARAMETERS.items()}
    torch.testing.assert_close(table.positions, parameters["r_params"].sigmoid())
    torch.testing.assert_close(table.weights, parameters["weight_s"].softmax(-1))
    torch.testing.assert_close(table.scale_dir, 0.95 + 0.1 * (parameters["scale_dir_params"] / 2).sigmoid())
    assert table.scale_time is None
    assert metadata == PUBLIC_ATTRIBUTES
    assert not canary.exists()


@golden.needs_golden
@pytest.mark.parametrize("name", golden.table_names())
def test_published_tables_read_from_json_and_from_the_public_pickle_alike(public_modules, tmp_path, name):
    published = golden.table(name)
    (tmp_path / "a.json").write_text(json.dumps(published))
    table, metadata = load_snapshot(tmp_path / "a.json")
    assert table.positions.tolist() == published["r"]
    assert table.weights.tolist() == published["w"]
    expected = {key: value for key, value in published["metadata"].items() if key != "training"}
    assert metadata == {**expected, "num_steps": published["num_steps"], "num_points": published["num_points"]}

    # beside each other, the two must agree
    (tmp_path / "a.pkl").write_bytes(
        _public_snapshot(published["logits"], published["metadata"], tmp_path / "executed")
    )
    _assert_equal(load_snapshot(tmp_path / "a.pkl")[0], table)
    (tmp_path / "a.json").unlink()
    read, metadata = load_snapshot(tmp_path / "a.pkl")
    _assert_equal(read, table, tolerance=1e-13)
    assert metadata.items() >= expected.items()


# -------------------------------------------------------------------------------------------------------- refusals


class _Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _touch(path):
    Path(path).touch()


def _torch_storage_with_payload(canary):
    """A storage as torch._load_from_bytes takes it, whose own pickle would create the file."""
    content = io.BytesIO()
    torch.save(_Payload(os.system, f"touch {canary}"), content, _use_new_zipfile_serialization=False)
    return _Payload(torch.storage._load_from_bytes, content.getvalue())


@pytest.mark.parametrize(
    "payload",
    [
        lambda canary: _Payload(_touch, str(canary)),
        lambda canary: _Payload(os.system, f"touch {canary}"),
        lambda canary: _Payload(eval, f"open({str(canary)!r}, 'w')"),
        lambda canary: _Payload(getattr, 1, "real"),
        _torch_storage_with_payload,
    ],
)
@pytest.mark.parametrize("place", ["alone", "model", "beside", "inside"])
def test_a_payload_is_refused_and_not_run(tmp_path, payload, place):
    canary, path = tmp_path / "executed", tmp_path / "network-snapshot-000001.pkl"
    predictor = EPD_predictor(3)
    hostile = payload(canary)
    contents = {"alone": hostile, "model": {"model": hostile}, "beside": {"model": predictor, "loss_fn": hostile}}
    if place == "inside":
        predictor.__dict__["extra"] = hostile
    path.write_bytes(pickle.dumps(contents.get(place, {"model": predictor})))
    with pytest.raises(InputError) as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not canary.exists()


def test_the_payloads_of_these_tests_do_work_on_a_plain_unpickler(tmp_path):
    pickle.loads(pickle.dumps({"model": _Payload(_touch, str(tmp_path / "executed"))}))
    assert (tmp_path / "executed").exists()


def _saved(tmp_path, change):
    """A valid .pkl's predictor, changed and pickled again."""
    path = save_snapshot(tmp_path / "network-snapshot-000001.pkl", _table(), METADATA)
    path.with_suffix(".json").unlink()
    model = pickle.loads(path.read_bytes())["model"]
    with torch.no_grad():
        snapshot = change(model)
    path.write_bytes(pickle.dumps(snapshot))
    return path


def _with_parameter(name, value):
    def change(model):
        model._parameters[name] = torch.nn.Parameter(value)
        return {"model": model}

    return change


def _with_attribute(name, value):
    def change(model):
        vars(model)[name] = value
        return {"model": model}

    return change


def _without_attribute(name):
    def change(model):
        del vars(model)[name]
        return {"model": model}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_parameter("r_params", torch.full((3, 2), math.nan)), "r_params holds NaN"),
        (_with_parameter("weight_s", torch.full((3, 2), math.inf)), "weight_s holds NaN, infinity"),
        (_with_parameter("weight_s", torch.zeros(3, 3)), r"weight_s has the shape \(3, 3\)"),
        (_with_parameter("r_params", torch.zeros(3)), r"r_params has the shape \(3,\)"),
        (_with_parameter("r_params", torch.full((3, 2), 1e4)), r"positions must lie inside \(0, 1\)"),
        (_with_attribute("num_steps", 7), "num_steps=7"),
        (_with_attribute("num_points", 5), "num_points=5"),
        (_with_attribute("scale_dir", -1.0), "scale_dir is -1.0"),
        (_with_attribute("scale_dir", math.nan), "scale_dir is nan"),
        (_with_attribute("scale_time", math.inf), "scale_time is inf"),
        (_with_attribute("scale_dir", "0.05"), "scale_dir is a str"),
        (_with_attribute("scale_dir", True), "scale_dir is True"),
        (_with_attribute("scale_time", None), "scale_time is None"),
        (_with_attribute("scale_time", torch.tensor(0.05)), "scale_time is a Tensor"),
        (_with_attribute("scale_dir", 10**400), "scale_dir is a int"),
        (_without_attribute("scale_time"), "scale_time is missing"),
        (_with_attribute("guidance_rate", math.nan), "guidance_rate is nan"),
        (_with_attribute("sigma_max", math.inf), "sigma_max is inf"),
        (_with_attribute("num_steps", 4.0), "num_steps=4.0"),
        (_with_attribute("dataset_name", "half a character \ud800"), "dataset_name is a str"),
        (lambda model: model, "EPD_predictor under the key 'model'"),
        (lambda model: {"ema": model}, "EPD_predictor under the key 'model'"),
        (lambda model: {"model": model.state_dict()}, "EPD_predictor under the key 'model'"),
        (lambda model: {"model": torch.nn.Linear(1, 1)}, "asks for torch.nn.modules.linear.Linear"),
        (lambda model: {"model": 3}, "EPD_predictor under the key 'model'"),
    ],
)
def test_a_pickle_that_is_no_valid_snapshot_is_refused(tmp_path, change, message):
    path = _saved(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_snapshot(path)
    assert str(path) in str(caught.value)


def _edited(**changes):
    return lambda described: {**_unchecked(described), **changes}


def _unchecked(described):
    return {key: value for key, value in described.items() if key != "sha256"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edited(r=[[0.3, 1.0]] * 3), r"positions must lie inside \(0, 1\)"),
        (_edited(r=[[0.0, 0.5]] * 3), r"positions must lie inside \(0, 1\)"),
        (_edited(w=[[0.5, 0.51]] * 3), "weights must sum to 1"),
        (_edited(w=[[1.5, -0.5]] * 3), "weights must be at least 0"),
        (_edited(r=[[math.nan, 0.5]] * 3), "positions must be finite"),
        (_edited(r=[[0.3, 0.5]] * 2), "weights has shape"),
        (_edited(r=[[0.3, 0.5], [0.4], [0.3, 0.5]]), "r must be rows"),
        (_edited(r=[[0.3, "0.5"]] * 3), "r must be rows"),
        (_edited(r=[[[0.3]]] * 3), "r must be rows"),
        (_edited(r=[]), "r must be rows"),
        (_edited(r=None), "r must be rows"),
        (_edited(r=[[0.3, 10**400]] * 3), "r must be rows"),
        (_edited(scale_time=[[0.0, 1.0]] * 3), "scale_time must be positive"),
        (_edited(num_steps=4.0), "num_steps=4.0"),
        (_edited(num_steps=[[4]]), r"num_steps=\[\[4\]\]"),
        (_edited(metadata={"guidance_rate": 10**400}), "metadata"),
        (_edited(metadata={"dataset_name": "half a character \ud800"}), "metadata"),
        (_edited(num_steps=3), "num_steps=3"),
        (_edited(metadata=[1]), "metadata"),
        (_edited(metadata=json.loads('{"a": ' + "[" * 600 + "]" * 600 + "}")), "metadata"),
        (lambda described: {key: described[key] for key in ("r", "w")}, "lacks one of the keys"),
        (lambda described: [described], "lacks one of the keys"),
    ],
)
def test_a_json_that_is_no_valid_snapshot_is_refused(tmp_path, change, message):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA)
    path.unlink()
    path = path.with_suffix(".json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message) as caught:
        load_snapshot(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
@pytest.mark.parametrize("kept", [0, 1, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, suffix, kept):
    path = save_snapshot(tmp_path / "snapshot.pkl", _table(), METADATA).with_suffix(suffix)
    content = path.read_bytes()
    for other in (".pkl", ".json"):
        path.with_suffix(other).unlink()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(InputError, match="cut off"):
        load_snapshot(path)


def _spliced(path, opcodes):
    """A valid .pkl with an attribute that these opcodes make."""
    mark = 123_456_789
    model = EPD_predictor(3)
    vars(model)["note"] = mark
    content = pickle.dumps({"model": model}, protocol=3)  # no frames, whose lengths would have to be right
    before = b"J" + mark.to_bytes(4, "little")
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, opcodes))
    return path


def _kept(number):
    """The opcodes that keep what was made last under a number, and that fetch it."""
    place = number.to_bytes(4, "little")
    return b"r" + place, b"j" + place


KEEP, FETCH = _kept(240)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"]" + KEEP + FETCH + b"a", "holds itself"),
        (b"}" + KEEP + b"K\x01" + FETCH + b"s", "holds itself"),
        (b"]" * 3000 + b"a" * 2999, "levels deep"),
        (b"K\x01" + b"\x85" * 3000, "levels deep"),
        (b"](K\x01" + (KEEP + b"](" + FETCH * 10 + b"e") * 8 + b"e", "more than 50,000 entries"),
        (b"})" + (KEEP + FETCH + b"\x86") * 40 + b"K\x01s", "nested tuples"),
        (b"](" + b"N" * 60_000 + b"e", "more than 50,000 opcodes"),
    ],
)
def test_settings_that_no_walk_gets_through_are_refused(tmp_path, opcodes, message):
    path = _spliced(tmp_path / "network-snapshot-000001.pkl", opcodes)
    with pytest.raises(InputError, match=message) as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)


def test_a_large_number_for_a_place_takes_no_memory(tmp_path):
    path = _spliced(tmp_path / "network-snapshot-000001.pkl", b"]" + _kept(2**27)[0])
    tracemalloc.start()
    load_snapshot(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_all_tensors_together_are_of_bounded_size(tmp_path):
    model = EPD_predictor(3)
    vars(model)["notes"] = [torch.zeros(2**18) for _ in range(3)]
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(pickle.dumps({"model": model}))
    with pytest.raises(InputError, match="a tensor of 262,144 numbers"):
        load_snapshot(path)


# Once: what is shared among the strings of two pickles, and so their length, depends on what ran before.
WHOLE_PICKLE = pickle.dumps({"model": EPD_predictor(3)}, protocol=4)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_reads_or_is_refused_but_never_crashes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    content = bytearray(WHOLE_PICKLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        table, _ = load_snapshot(path)
    except InputError:
        return
    assert table.positions.isfinite().all()


def test_a_huge_file_and_a_huge_tensor_are_refused(tmp_path):
    path = tmp_path / "huge.pkl"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse: takes no room
    with pytest.raises(InputError, match="is no snapshot"):
        load_snapshot(path)
    # one number, claimed to be a thousand billion by a stride of 0
    zeros = torch.zeros(1).expand(10**12, 1)
    path.write_bytes(pickle.dumps({"model": zeros}))
    with pytest.raises(InputError, match="a tensor of 1,000,000,000,000 numbers"):
        load_snapshot(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x07\x00\x00\x00" * 9, b"PK\x03\x04" + bytes(30), b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_pickle_is_refused(tmp_path, content):
    path = tmp_path / "picture.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is no pickle"):
        load_snapshot(path)


def test_missing_files_and_other_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_snapshot(tmp_path / "missing.pkl")
    with pytest.raises(InputError, match=r"\.pkl or a \.json"):
        load_snapshot(tmp_path / "policy.pt")
    with pytest.raises(InputError, match=r"\.pkl and a \.json"):
        save_snapshot(tmp_path / "policy.pt", _table(), {})


# ------------------------------------------------------------------------------------------------------------ find


def _run(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_find_takes_the_newest_of_a_run(tmp_path):
    run = _run(
        tmp_path / "00003-shapes-3-4-epd-dpm2-9-discrete",
        "network-snapshot-000009.pkl",
        "network-snapshot-000010.json",
        "network-snapshot-000010.pkl",
        "network-snapshot-000002.pkl",
        "training_options.json",
        ".network-snapshot-000099.pkl.1.tmp",
    )
    expected = run / "network-snapshot-000010.pkl"
    for source in (run, str(run), 3, "3", "00003", expected):
        assert find_snapshot(source, root=tmp_path) == expected
    assert find_snapshot(expected.with_suffix(".json")) == expected.with_suffix(".json")


def test_find_takes_the_json_where_it_is_alone_and_looks_into_export(tmp_path):
    export = _run(
        tmp_path / "20260101-000000-run" / "export",
        "network-snapshot-export-step000040.json",
        "network-snapshot-export-step000005.pkl",
        "training_options-export-step000040.json",
    )
    for source in (export, export.parent):
        assert find_snapshot(source) == export / "network-snapshot-export-step000040.json"


def test_find_says_what_it_looked_for(tmp_path):
    _run(tmp_path / "00001-a")
    _run(tmp_path / "00002-a")
    _run(tmp_path / "00002-b")
    for source, message in (
        (7, r"experiment 7: no folder .*00007-\*; there are: 00001-a, 00002-a, 00002-b"),
        (2, r"several folders have that number \(00002-a, 00002-b\)"),
        (1, r"00001-a: holds no network-snapshot-\*\.pkl or \.json, neither itself nor in its folder export/"),
        (tmp_path / "nowhere", "nowhere: no such snapshot or run"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            find_snapshot(source, root=tmp_path)
        assert "export it first" not in str(refused.value)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"export it first:  python -m training\.ppo\.export_epd_predictor .*run$"):
        find_snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=rf"there are: none in {tmp_path / 'run'}: start commands in the checkout"):
        find_snapshot(3, root=tmp_path / "run")
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"training\.ppo\.export_epd_predictor '.*my run'$"):  # as it is to be typed
        find_snapshot(tmp_path / "my run")
