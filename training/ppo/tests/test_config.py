"""The configuration: closed, typed, cross-checked, all faults at once; the snapshot's word and the override's."""

import re
from pathlib import Path
from time import perf_counter

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import InputError
from models.options import ModelOptions
from solvers import EPDTable
from training.ppo.config import KNOBS, Config, apply_snapshot, build_config, load_config, model_options
from training.runs.configuration import LoadedConfig, config_hash, to_plain, to_yaml, value_of
from training.solver import Origin, Solver, solver_of

CFGS = Path(__file__).resolve().parents[1] / "cfgs"
LEAST = {
    "data": {"predictor_snapshot": "exps/a.pkl", "prompt_csv": "train.csv"},
    "reward": {"weights_path": "weights/reward.pt"},
    "logging": {"eval_interval": 0},
}
METADATA = {
    "dataset_name": "shapes",
    "guidance_type": "cfg",
    "guidance_rate": 7.5,
    "schedule_type": "discrete",
    "schedule_rho": 1.0,
}
PUBLIC_KEYS = {
    "run": {"output_root", "run_name", "seed"},
    "data": {"predictor_snapshot", "prompt_csv"},
    "model": {"num_steps", "num_points", *METADATA},
    "reward": {"weights_path", "batch_size", "enable_amp", "cache_dir"},
    "ppo": {
        *("rollout_batch_size", "rloo_k", "ppo_epochs", "minibatch_size", "learning_rate", "clip_range", "kl_coef"),
        *("entropy_coef", "max_grad_norm", "decode_rgb", "steps", "dirichlet_concentration"),
    },
    "logging": {"log_interval", "save_interval"},
}


def least(*overrides: str, **sections: dict) -> LoadedConfig:
    return build_config(
        {name: {**LEAST.get(name, {}), **sections.get(name, {})} for name in {*LEAST, *sections}},
        "config.yaml",
        overrides,
    )


def faults_of(*overrides: str, **sections: dict) -> list[str]:
    with pytest.raises(InputError) as caught:
        least(*overrides, **sections)
    head, *lines = str(caught.value).splitlines()
    assert re.fullmatch(rf"the configuration has {len(lines)} faults?:", head)
    return lines


def test_public_keys_are_there_and_every_knob_is_documented():
    assert {f"{section}.{key}" for section, keys in PUBLIC_KEYS.items() for key in keys} <= KNOBS.keys()
    assert all(len(known.metadata["meaning"]) > 10 for known in KNOBS.values())


# The template leaves out what its user fills in: tests/test_how_to.py runs it filled in.
@pytest.mark.parametrize("name", sorted(path.name for path in CFGS.glob("*.yaml") if path.stem != "own_model"))
def test_shipped_configurations_hold_every_public_key(name: str):
    written = yaml.safe_load((CFGS / name).read_text())
    assert all(keys <= written[section].keys() for section, keys in PUBLIC_KEYS.items())
    loaded = load_config(CFGS / name)
    assert loaded.overridden == frozenset()
    assert loaded.config.run.run_name == name.removesuffix(".yaml")


def test_the_two_models_of_the_shapes_world_are_tuned_alike():
    one, other = (yaml.safe_load((CFGS / f"{name}.yaml").read_text()) for name in ("shapes", "shapes_flow"))
    differing = {f"{part}.{key}" for part in one for key in one[part] if one[part][key] != other[part][key]}
    assert one.keys() == other.keys()
    assert differing == {"run.run_name", "data.predictor_snapshot", "model.dataset_name"}


def test_yaml_reads_back_and_keeps_the_hash(tmp_path: Path):
    config = least("reward.mix={weights/b.pt: 0.5}", "ppo.learning_rate=7e-5").config
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "c.yaml").config
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert config_hash(least("ppo.steps=101").config) != config_hash(least().config)


PUBLIC_MODEL = {
    "backend": "flux",
    "sigma_min": "0.001",
    "flowmatch_mu": "1.15",
    "resolution": "1024",
    "backend_options": {
        "model_name_or_path": "black-forest-labs/FLUX.1-dev",
        "torch_dtype": "bfloat16",
        "enable_model_cpu_offload": None,
    },
}
PUBLIC_REWARD = {
    "type": "multi",
    "multi": {"weights": {"hps": "2.0", "pickscore": "0.5", "imagereward": "0.0", "clip": "1"}, "clip": {}},
}


def test_keys_of_public_configurations_are_refused_with_the_lines_that_replace_them():
    assert sorted(faults_of(model=PUBLIC_MODEL, reward=PUBLIC_REWARD)) == sorted(
        f"  - config.yaml: {key} is gone: {instead}"
        for key, instead in (
            ("model.sigma_min", "leave it out: the predictor snapshot says it, or the model"),
            ("model.flowmatch_mu", "leave it out: the predictor snapshot says it, or the model"),
            ("model.resolution", "write model.height=1024 model.width=1024 in its place"),
            (
                "model.backend_options",
                "write model.model_path=black-forest-labs/FLUX.1-dev model.dtype=bfloat16 in its place",
            ),
            ("reward.type", "leave it out: reward.weights_path and reward.mix say it"),
            (
                "reward.multi",
                "write reward.weights_path=weights/HPS_v2.1_compressed.pt "
                "reward.mix={pickscore: 0.25, clip_score: 0.5} in its place",
            ),
        )
    )
    replaced = least(
        *("model.model_path=black-forest-labs/FLUX.1-dev", "model.dtype=bfloat16", "model.height=1024"),
        *("model.width=1024", "reward.weights_path=weights/HPS_v2.1_compressed.pt"),
        "reward.mix={pickscore: 0.25, clip_score: 0.5}",
        model={"backend": "flux"},
    ).config
    assert (replaced.model.backend, replaced.reward.mix) == ("flux", {"pickscore": 0.25, "clip_score": 0.5})


def test_keys_of_public_configurations_that_say_nothing_are_let_pass():
    silent = {"sigma_min": None, "backend_options": {"model_name_or_path": None, "torch_dtype": None}}
    assert least(model=silent, reward={"multi": None}) == least()


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("model.backend_options", "x", "write model.model_path, model.dtype, model.text_on_cpu in its place"),
        ("reward.multi", "3", "name one reward in reward.weights_path, and others with their weights in reward.mix"),
        ("reward.multi", "{weights: {hps: 0, clip: [1]}}", "name one reward in reward.weights_path"),
        ("reward.multi", "{weights: {hps: 0, aesthetic: 1}}", "write reward.weights_path=aesthetic reward.mix={} in"),
    ],
)
def test_odd_values_of_public_keys_are_refused_too(key: str, value: str, instead: str):
    assert f"--override: {key} is gone: {instead}" in faults_of(f"{key}={value}")[0]


def test_a_family_that_the_snapshot_contradicts_is_refused_and_one_that_it_says_is_taken():
    for theirs, ours, expected in (
        (None, None, None),
        ("sd3", None, "sd3"),
        (None, "sd3", "sd3"),
        ("sd3", "sd3", "sd3"),
    ):
        config, _ = apply_snapshot(least(model={"backend": ours}), snapshot({**METADATA, "backend": theirs}))
        assert config.model.backend == expected
    with pytest.raises(
        InputError, match=r"model.backend=flux: .* was made for the family sd3: choose a table for flux"
    ):
        apply_snapshot(least(model={"backend": "flux"}), snapshot({**METADATA, "backend": "sd3"}))


def test_override_has_the_last_word():
    loaded = least("ppo.steps=7", "ppo.steps=8", "run.seed=3", ppo={"steps": 5, "rloo_k": 2})
    assert (loaded.config.ppo.steps, loaded.config.ppo.rloo_k, loaded.config.run.seed) == (8, 2, 3)
    assert loaded.overridden == {"ppo.steps", "run.seed"}


def test_values_are_read_as_people_write_them():
    config = least("ppo.learning_rate=7e-5", "ppo.shared_noise=no", "model.guidance_rate=null", "run.run_name=2024",
                   "reward.mix={a.pt: 2}").config  # fmt: skip
    assert config.ppo.learning_rate == 7e-5
    assert config.ppo.shared_noise is False
    assert config.model.guidance_rate is None
    assert config.run.run_name == "2024"
    assert config.reward.mix == {"a.pt": 2.0}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.seed=0012", "run.seed", 12),  # octal in YAML 1.1
        ("ppo.steps=1_000", "ppo.steps", 1000),
        ("ppo.learning_rate=1e-3", "ppo.learning_rate", 1e-3),
        ("ppo.learning_rate=05", "ppo.learning_rate", 5.0),
        ("data.predictor_snapshot=00010", "data.predictor_snapshot", "00010"),
        ("run.run_name=no", "run.run_name", "no"),
        ("run.run_name=12:30", "run.run_name", "12:30"),  # sexagesimal in YAML 1.1
        ("run.run_name=2024-01-01", "run.run_name", "2024-01-01"),
        ("run.run_name=1e3", "run.run_name", "1e3"),
        ("run.run_name='null'", "run.run_name", "null"),
        ("data.prompt_csv=my file: #2 [a].csv", "data.prompt_csv", "my file: #2 [a].csv"),
        ("logging.panel=off", "logging.panel", "off"),
        ("logging.panel=null", "logging.panel", None),
        ("ppo.shared_noise=off", "ppo.shared_noise", False),
    ],
)
def test_a_value_means_what_was_typed(override: str, key: str, value: object, tmp_path: Path):
    """In an override, in a file, and in the file that a run writes of it."""
    config = least(override).config
    assert value_of(config, key) == value
    assert type(value_of(config, key)) is type(value)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml").config == config
    if "#" not in override:
        section, leaf = key.split(".")
        (tmp_path / "c.yaml").write_text(f"{section}:\n  {leaf}: {override.split('=')[1]}\n")
        others = [f"{name}.{leaf}={given}" for name, keys in LEAST.items() for leaf, given in keys.items()]
        others = [other for other in others if not other.startswith(key)]
        assert value_of(load_config(tmp_path / "c.yaml", others).config, key) == value


def test_an_override_of_a_mapping_takes_the_place_of_the_file_s():
    config = least("reward.mix={b.pt: 1}", reward={"mix": {"a.pt": 2}}).config
    assert config.reward.mix == {"b.pt": 1.0}
    assert least("reward.mix={}", reward={"mix": {"a.pt": 2}}).config.reward.mix == {}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("ppo.rlo_k", "ppo.rloo_k"),
        ("ppo.seed", "run.seed"),
        ("learning_rate", "ppo.learning_rate"),
        ("ppo.learningrate", "ppo.learning_rate"),
        ("model.guidance_scale", "model.guidance_rate"),
        ("loging.save_interval", "logging.save_interval"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, meant: str):
    (line,) = faults_of(f"{wrong}=1")
    assert f"unknown key {wrong}; did you mean {meant}?" in line


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(KNOBS)), st.integers(0, 30), st.sampled_from("xq_"))
def test_any_key_with_a_letter_too_many_is_refused_and_found(key: str, place: int, letter: str):
    section, leaf = key.split(".")
    place = min(place, len(leaf))
    wrong = f"{section}.{leaf[:place]}{letter}{leaf[place:]}"
    (line,) = faults_of(f"{wrong}=1")
    assert "unknown key" in line
    assert "did you mean" in line


def test_all_faults_come_at_once():
    lines = faults_of(
        "ppo.clip_range=2",
        "ppo",
        run={"run_nam": "x", "seed": -1},
        ppo={"rollout_batch_size": 30, "rloo_k": "four", "minibatch_size": 7},
        data={"prompt_csv": ""},
        reward={"batch_size": 1.5},
    )
    expected = [
        "--override ppo: expected section.key=value",
        "config.yaml: unknown key run.run_nam; did you mean run.run_name?",
        "config.yaml: ppo.rloo_k='four'",
        "config.yaml: reward.batch_size=1.5",
        "config.yaml: run.seed=-1 must be at least 0",
        "config.yaml: data.prompt_csv is not set",
        "--override: ppo.clip_range=2.0 must be at most 1",
        "ppo.minibatch_size=7 does not divide ppo.rollout_batch_size=30",
    ]
    assert len(lines) == len(expected)
    assert all(any(part in line for line in lines) for part in expected)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["ppo.rollout_batch_size=30", "ppo.minibatch_size=30"], "set ppo.rollout_batch_size=32"),
        (["ppo.minibatch_size=24"], "set ppo.minibatch_size=32"),
        (["run.num_devices=3"], "set ppo.rollout_batch_size=36"),
        (["logging.preview_prompts=65"], "set logging.preview_prompts=64 or less"),
        (["reward.mix={other/reward.pt: 1}"], "two rewards are called reward"),
        (["ppo.decode_rgb=false"], "every reward here scores RGB images"),
        (["logging.eval_interval=5"], "logging.eval_interval=5 but logging.eval_prompts is null"),
        (["logging.panel=verifier", "logging.eval_interval=null"], "logging.panel=verifier but"),
        (["logging.stop_on_reward_hacking=true"], "without a panel no hacking is seen"),
        (["logging.panel=weights/reward.pt"], "is trained on"),
        (["logging.eval_prompts=train.csv"], "held-out prompts must not be trained on"),
        (["reward.mix={a.pt: 0}"], "other than 0"),
        (["reward.mix={a.pt: 1e300}"], "its size 1e-06 to 1e+06"),
        (["ppo.dirichlet_concentration=1e300"], "must be at most 1e+09"),
        (["ppo.dirichlet_concentration=5e-324"], "must be at least 1e-06"),
        (["ppo.learning_rate=.nan"], "must be a finite number"),
        (["ppo.baseline=all"], "must be one of prompt, mixed"),
        (["ppo.steps=[1"], "not readable as YAML"),
        (["ppo.steps=true"], "could not be converted to Integer"),
        (["ppo.steps=null"], "ppo.steps=None"),
        (["ppo.steps=12:30"], "could not be converted to Integer"),
        (["ppo.steps=0x_"], "could not be converted to Integer"),
        (["ppo.steps=2.0"], "could not be converted to Integer"),
        ([f"ppo.steps={'9' * 400}"], "must be at most 1000000000"),
        ([f"run.seed={'9' * 5000}"], "could not be converted to Integer"),
        ([f"ppo.learning_rate={'9' * 400}"], "must be a finite number"),
        (["ppo.learning_rate=-.inf"], "must be a finite number"),
        (["run.seed=!!bool xyz"], "not readable as YAML"),
        (["run.seed=\udc80"], "not readable as YAML"),
        (["run.seed=${run.seed}"], "are not resolved: write the value itself"),
        (["data.prompt_csv=${HOME}/prompts.csv"], "are not resolved: write the value itself"),
        (["run.run_name=???"], "are not resolved: write the value itself"),
        (["reward.mix={a.pt: ${foo}}"], "YAML"),
        (["reward.mix={a.pt: '${foo}'}"], "are not resolved: write the value itself"),
        (["reward.mix={a.pt: {b.pt: 1}}"], "reward.mix="),
        (['run.run_name="a\\0b"'], "holds characters that no text has"),
        (["run.run_name=a/b"], "it becomes a part of a folder's name"),
    ],
)
def test_single_faults(overrides: list[str], part: str):
    (line,) = faults_of(*overrides)
    assert part in line


@pytest.mark.parametrize(
    "override", ["ppo.rloo_k=0", "run.num_devices=0", "ppo.minibatch_size=0", "logging.eval_count=-1"]
)
def test_a_value_out_of_range_is_one_fault(override: str):
    (line,) = faults_of(override)
    assert f"{override} must be at least" in line


def test_an_override_has_the_last_word_over_a_value_that_cannot_be():
    assert (
        least("ppo.steps=3", "ppo.rloo_k=x", "ppo.rloo_k=2", ppo={"steps": None, "rloo_k": "four"}).config.ppo.steps
        == 3
    )


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        ("[positions, sigmas]", "names sigmas; known are positions, weights, scale_dir, scale_time, guidance, history"),
        ("[weights, grid, weights]", "names weights twice"),
        ("[]", "must name something; known are positions, weights"),
        ("[[positions]]", "ppo.train="),
        ("positions", "must be a list in brackets, [one, two]"),
        ("null", "must be a list in brackets, [one, two]"),
        ("{positions: 1}", "must be a list in brackets, [one, two]"),
        ("[null]", "ppo.train="),
    ],
)
def test_what_is_trained_is_a_list_of_known_names_each_once(train: str, fault: str):
    (line,) = faults_of(f"ppo.train={train}")
    assert fault in line
    assert "what is drawn and tuned" in line


def test_what_is_trained_is_read_as_it_is_written(tmp_path: Path):
    assert least().config.ppo.train == ["positions", "weights"]
    config = least("ppo.train=[grid, history]", ppo={"train": ["weights"]}).config
    assert config.ppo.train == ["grid", "history"]
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml").config == config


@pytest.mark.parametrize("scale", ["scale_dir", "scale_time"])
def test_flags_of_earlier_versions_say_what_to_write_instead(scale: str):
    for line in (
        *faults_of(ppo={f"train_{scale}": False}),
        *faults_of(f"ppo.train_{scale}=true"),
    ):
        assert line.endswith(
            f"ppo.train_{scale} is gone: name {scale} in ppo.train, ppo.train=[positions, weights, {scale}], "
            f"where it was true"
        )
    least(f"ppo.train=[positions, weights, {scale}]")


def test_what_a_message_proposes_works():
    assert least("run.num_devices=3", "ppo.rollout_batch_size=36", "ppo.minibatch_size=36").config.run.num_devices == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("- 1\n", "found a list"),
        ("run: [\n", "not a readable YAML file"),
        ("run: 4\n", "run=4: expected keys and values"),
        ("runs: {seed: 1}\n", "unknown section runs; did you mean run?"),
        ("4\n", "expected sections (run, data, model, reward, ppo, search, logging), found '4'"),
        ("run: {seed: 1, seed: 2}\n", "the key seed is there twice"),
        ("run: {seed: !!bool xyz}\n", "not a readable YAML file"),
        ("run: !!python/object/apply:os.mkdir [made]\n", "not a readable YAML file"),
        ("run: {seed: '${oc.env:HOME}'}\n", "are not resolved: write the value itself"),
        ("run: &run {seed: *run}\n", "is nested too deeply"),
        ("run: " + "[" * 9000, "is nested too deeply"),
        ("- " * 9000, "is nested too deeply"),
        ("#" * 40000, "it has more than 32768 bytes"),
        ("".join(f"k{number}: 1\n" for number in range(30)), "and 12 more"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, part: str):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    start = perf_counter()
    with pytest.raises(InputError, match=re.escape(part)) as caught:
        load_config(path)
    assert perf_counter() - start < 5
    assert len(str(caught.value)) < 5000


def test_what_repeats_itself_is_refused_before_it_is_written_out(tmp_path: Path):
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (tmp_path / "c.yaml").write_text("run:\n  " + "\n  ".join([*lines, "seed: *i"]))
    with pytest.raises(InputError, match="is nested too deeply") as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 5000


def test_missing_file_points_to_the_shipped_ones(tmp_path: Path):
    with pytest.raises(InputError, match=r"no such configuration file.*training/ppo/cfgs/"):
        load_config(tmp_path / "none.yaml")


def snapshot(metadata: dict, **columns: torch.Tensor) -> Solver:
    halves = torch.full((3, 2), 0.5)
    return solver_of(EPDTable(halves, halves, **columns), Origin(Path("a.pkl"), "", metadata))


def test_snapshot_fills_what_is_null():
    config, notes = apply_snapshot(least(), snapshot(METADATA))
    model = config.model
    assert {name: getattr(model, name) for name in METADATA} == METADATA
    assert (model.num_steps, model.num_points, notes) == (4, 2, [])


@pytest.mark.parametrize(
    ("model", "prompts"),
    [
        ({}, "src/prompts/shapes_train.csv"),
        ({"dataset_name": "ms_coco"}, "src/prompts/MS-COCO_val2014_30k_captions.csv"),
        ({"dataset_name": "mine", "model_path": "sd15"}, "src/prompts/MS-COCO_val2014_30k_captions.csv"),
    ],
)
def test_no_prompts_are_the_usual_ones_of_the_model(model: dict, prompts: str):
    said = METADATA | {"dataset_name": model.get("dataset_name", "shapes")}
    config, notes = apply_snapshot(least(data={"prompt_csv": None}, model=model), snapshot(said))
    assert config.data.prompt_csv == prompts
    assert notes == []


def test_a_model_without_usual_prompts_needs_some():
    with pytest.raises(InputError, match=r"data\.prompt_csv is null and mine is no model that has usual prompts"):
        apply_snapshot(least(data={"prompt_csv": None}), snapshot(METADATA | {"dataset_name": "mine"}))


@pytest.mark.parametrize(
    ("said", "interval"),
    [({}, 0), ({"eval_prompts": "b.csv"}, 25), ({"eval_prompts": "b.csv", "eval_interval": 3}, 3)],
)
def test_who_names_no_held_out_prompts_gets_no_evaluation(said: dict, interval: int):
    config, _ = apply_snapshot(least(logging={"eval_interval": None, **said}), snapshot(METADATA))
    assert config.logging.eval_interval == interval


def test_agreement_with_the_snapshot_is_no_note():
    loaded = least("model.guidance_rate=7.5", model={"num_steps": 4})
    assert apply_snapshot(loaded, snapshot(METADATA))[1] == []


def test_contradicted_snapshot_is_an_error_unless_overridden():
    with pytest.raises(InputError) as caught:
        apply_snapshot(least(model={"guidance_rate": 5.0, "schedule_type": "logsnr"}), snapshot(METADATA))
    assert "2 faults" in str(caught.value)
    assert "--override model.guidance_rate=5.0" in str(caught.value)
    config, notes = apply_snapshot(least("model.guidance_rate=5"), snapshot(METADATA))
    assert config.model.guidance_rate == 5.0
    assert notes == ["model.guidance_rate=5.0 by --override; a.pkl says 7.5"]


def test_how_the_model_was_loaded_comes_with_the_snapshot():
    made = snapshot(METADATA | {"model_options": {"height": 24, "lora": "a.safetensors:0.5"}})
    config, notes = apply_snapshot(least(), made)
    assert model_options(config) == ModelOptions(lora="a.safetensors:0.5", height=24)
    assert notes == []
    with pytest.raises(InputError, match=r"model\.height=32: \S+ was made with 24: leave the key out, or insist with"):
        apply_snapshot(least(model={"height": 32}), made)
    config, notes = apply_snapshot(least("model.height=32", "model.text_on_cpu=true"), made)
    assert model_options(config) == ModelOptions(lora="a.safetensors:0.5", height=32, text_on_cpu=True)
    assert [note.partition(";")[0] for note in notes] == ["model.height=32 by --override"]
    with pytest.raises(InputError, match=r"a\.pkl: model_options is \{'size': 3\}: these are no options of a model"):
        snapshot(METADATA | {"model_options": {"size": 3}})


def test_another_schedule_comes_with_its_own_exponent():
    loaded = least("model.schedule_type=polynomial")
    assert apply_snapshot(loaded, snapshot(METADATA))[0].model.schedule_rho == 7.0
    loaded = least("model.schedule_type=polynomial", "model.schedule_rho=5")
    assert apply_snapshot(loaded, snapshot(METADATA))[0].model.schedule_rho == 5.0
    without = METADATA | {"schedule_type": "logsnr", "schedule_rho": None}
    assert apply_snapshot(least(), snapshot(without))[0].model.schedule_rho == 1.0


def test_public_snapshots_may_leave_the_kind_of_guidance_out():
    config, _ = apply_snapshot(least(), snapshot(METADATA | {"guidance_type": None}))
    assert (config.model.guidance_type, config.model.guidance_rate) == ("cfg", 7.5)
    config, _ = apply_snapshot(least("model.guidance_type=uncond"), snapshot(METADATA))
    assert config.model.guidance_rate == 1.0


def test_no_override_changes_the_table_s_shape():
    with pytest.raises(InputError, match=r"model.num_steps=6: the table in a.pkl has 4"):
        apply_snapshot(least("model.num_steps=6"), snapshot(METADATA))


def test_silent_snapshot_needs_the_configuration_to_speak():
    silent = dict.fromkeys(METADATA)
    with pytest.raises(InputError, match="2 faults") as caught:
        apply_snapshot(least(), snapshot(silent))
    assert "dataset_name is null" in str(caught.value)
    assert "schedule_type is null" in str(caught.value)  # guidance then is the model's own
    assert apply_snapshot(least(model=METADATA), snapshot(silent))[0].model.schedule_type == "discrete"


def test_noise_levels_of_a_table_s_own_stand_for_its_schedule():
    levels = METADATA | {"sigmas": [9.0, 3.0, 1.0, 0.1], "schedule_type": None, "schedule_rho": None}
    model = apply_snapshot(least(), snapshot(levels))[0].model
    assert (model.schedule_type, model.schedule_rho) == (None, None)
    with pytest.raises(InputError, match=r"noise levels of its own"):
        apply_snapshot(least(model={"schedule_type": "logsnr"}), snapshot(levels))
    config, notes = apply_snapshot(least("model.schedule_type=polynomial"), snapshot(levels))
    assert (config.model.schedule_type, config.model.schedule_rho) == ("polynomial", 7.0)
    assert notes == ["model.schedule_type=polynomial by --override; a.pkl says noise levels of its own"]


def test_a_guidance_column_stands_for_the_one_scale():
    table = snapshot(METADATA | {"guidance_rate": None}, guidance=torch.full((3, 3), 2.0))
    model = apply_snapshot(least(), table)[0].model
    assert (model.guidance_type, model.guidance_rate) == (None, None)
    with pytest.raises(InputError, match=r"model.guidance_rate=5.0: the table in a.pkl has a guidance"):
        apply_snapshot(least("model.guidance_rate=5"), table)


def test_plain_values_cover_every_knob():
    plain = to_plain(Config())
    assert {f"{section}.{key}" for section, keys in plain.items() for key in keys} == KNOBS.keys()
    assert all(value_of(Config(), key) == plain[key.split(".")[0]][key.split(".")[1]] for key in KNOBS)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
