"""The best schedule of each solver, paired differences, what is kept on disk, and the written tables."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from errors import InputError
from solvers import EPDTable
from training.measuring.comparison import TOTAL, Baseline, Comparison, Entry, SetDistance, parse_baseline
from training.measuring.distances import frechet, gaussian_of, paired_frechet_values
from training.measuring.evaluation import Measured, Store, key_of
from training.measuring.evaluation_page import evaluation_page
from training.measuring.metrics import METRICS
from training.measuring.protocol import Published
from training.measuring.report import Report
from training.measuring.statistics import bootstrap_indices, mean_interval, paired_difference_interval
from training.solver import Schedule, Solver

ROWS = 24


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGET = draw(0, ROWS, 3)
SHARED = draw(1, ROWS)  # how hard each prompt is, for every solver
FRECHET = {"frechet": SetDistance("seen", "a target", lambda features: paired_frechet_values(features, TARGET))}


def entry(label, solver, schedule, nfe, *, reward, distance, exploded=0):
    seed = sum(map(ord, label + schedule)) + nfe
    values = {
        "reward": reward + SHARED + 0.01 * draw(seed, ROWS),
        "latent_rms": distance + 0.01 * draw(seed + 1, ROWS).abs(),
        "pixel_rms": distance / 10 + 0.001 * draw(seed + 2, ROWS).abs(),
    }
    features = {"seen": TARGET + distance * (1 + draw(seed + 3, ROWS, 3))}
    measured = Measured(
        values=values,
        features=features.__getitem__,
        exploded=torch.arange(ROWS) < exploded,
        previews=torch.full((2, 16, 16, 3), seed % 256, dtype=torch.uint8),
        key=f"{label}-{schedule}-{nfe}",
    )
    steps = nfe // 2 if solver in ("epd", "heun") else nfe
    halves = torch.full((steps, 2), 0.5)
    table = EPDTable(halves, halves) if solver == "epd" else None
    return Entry(
        Solver(label, solver, steps + 1, table=table, schedule=Schedule(schedule, 1.0), guidance_scale=2.5), measured
    )


@pytest.fixture
def entries():
    return [
        entry("epd-00003", "epd", "discrete", 4, reward=2.0, distance=0.1),
        entry("ddim", "ddim", "discrete", 4, reward=1.0, distance=0.9, exploded=3),
        entry("ddim", "ddim", "logsnr", 4, reward=0.5, distance=0.5),
        entry("heun", "heun", "discrete", 4, reward=1.5, distance=0.7),
        entry("ddim", "ddim", "discrete", 8, reward=2.5, distance=0.05),
    ]


@pytest.fixture
def comparison(entries, tmp_path):
    return Comparison(entries, FRECHET, Store(tmp_path / "kept", pytest.fail), seed=5)


def cell(comparison, label, nfe, metric):
    return next(row for row in comparison.rows if (row.label, row.parallel) == (label, nfe)).cells[metric]


def test_each_metric_stands_at_its_own_best_schedule(comparison, entries):
    assert [(row.label, row.parallel) for row in comparison.rows] == [
        ("epd-00003", 4),
        ("ddim", 4),
        ("heun", 4),
        ("ddim", 8),
    ]
    assert cell(comparison, "ddim", 4, "reward").entry is entries[1]
    assert cell(comparison, "ddim", 4, "latent_rms").entry is entries[2]
    assert cell(comparison, "ddim", 4, "frechet").entry is entries[2]
    assert comparison.metrics == ["reward", "frechet", "latent_rms", "pixel_rms"]


def test_intervals_are_those_of_the_statistics(comparison, entries):
    indices = bootstrap_indices(ROWS, torch.Generator().manual_seed(5))
    values = entries[1].measured.values["reward"]
    assert cell(comparison, "ddim", 4, "reward").interval == mean_interval(values, indices)
    found = cell(comparison, "epd-00003", 4, "frechet").interval
    expected = frechet(gaussian_of(entries[0].measured.features("seen")), gaussian_of(TARGET))
    assert found.estimate == pytest.approx(expected)
    assert found.low <= found.estimate <= found.high


def found(differences, label, metric):
    (match,) = [item for item in differences if (item.row.label, item.row.parallel, item.metric) == (*label, metric)]
    return match


def test_differences_are_paired_and_taken_between_best_schedules(comparison, entries):
    differences = comparison.differences([Baseline("classical", None)])
    reward = found(differences, ("epd-00003", 4), "reward")
    assert reward.baseline_entry is entries[3]  # heun has the best reward of the classical ones at 4
    indices = bootstrap_indices(ROWS, torch.Generator().manual_seed(5))
    ours, theirs = (item.measured.values["reward"] for item in (entries[0], entries[3]))
    assert reward.interval == paired_difference_interval(ours, theirs, indices)
    assert reward.interval.high - reward.interval.low < 0.05  # the prompts' own spread, some 1, is gone
    assert reward.verdict == "better"
    distance = found(differences, ("epd-00003", 4), "latent_rms")
    assert distance.baseline_entry is entries[2]
    assert distance.interval.estimate < 0
    assert distance.verdict == "better"
    assert found(differences, ("ddim", 4), "reward").verdict == "worse"
    assert found(differences, ("epd-00003", 4), "frechet").verdict == "better"


def test_what_is_best_is_chosen_on_the_validation_prompts(entries, tmp_path):
    """Where the order of two settings is another there, the one that is best there is reported, with its score here."""
    one, other = entries[1:3]  # ddim at 4 evaluations: the first has the better reward, the second the better distance
    swapped = [Entry(one.solver, other.measured), Entry(other.solver, one.measured)]
    store = Store(tmp_path / "kept", pytest.fail)
    elsewhere = Comparison(swapped, FRECHET, store, seed=5)
    here = Comparison(entries, FRECHET, store, seed=5, validation=elsewhere)
    assert cell(here, "ddim", 4, "reward").entry is other
    assert cell(here, "ddim", 4, "latent_rms").entry is one
    assert set(elsewhere.contenders()) == {one.solver, other.solver}
    assert cell(here, "heun", 4, "reward").entry is entries[3]  # the only one


def test_a_baseline_at_as_many_evaluations_in_all(entries, tmp_path):
    six = entry("ddim", "ddim", "discrete", 6, reward=9.0, distance=0.5)
    compared = Comparison([*entries, six], FRECHET, Store(tmp_path / "kept", pytest.fail), seed=5)
    baseline = parse_baseline("classical@total", [six.solver])
    differences = compared.differences([baseline])
    assert str(baseline) == "classical@total"
    assert found(differences, ("epd-00003", 4), "reward").baseline_entry is six  # 4 in sequence are 6 in all
    assert found(differences, ("ddim", 4), "reward").baseline_entry is entries[3]


def test_no_solver_is_held_against_itself(comparison):
    differences = comparison.differences([Baseline("classical", None)])
    assert not [item for item in differences if item.row.cells[item.metric].entry is item.baseline_entry]
    assert not [
        item for item in differences if (item.row.label, item.row.parallel, item.metric) == ("heun", 4, "reward")
    ]


def test_a_baseline_may_have_another_number_of_evaluations(comparison, entries):
    differences = comparison.differences([Baseline("ddim", 8)])
    assert {item.row.parallel for item in differences} == {4}
    assert all(item.baseline_entry is entries[4] for item in differences)
    assert found(differences, ("epd-00003", 4), "reward").verdict == "worse"
    assert comparison.differences([Baseline("heun", 8)]) == []


def test_baselines_are_read_and_refused(entries):
    solvers = [entries[number].solver for number in (1, 0, 4)]
    assert parse_baseline("classical", solvers) == Baseline("classical", None)
    assert parse_baseline("epd-00003@4", solvers) == Baseline("epd-00003", 4)
    assert str(parse_baseline("ddim@8", solvers)) == "ddim@8"
    with pytest.raises(InputError, match="'heun' is not compared here; there are classical, ddim, epd-00003"):
        parse_baseline("heun", solvers)
    with pytest.raises(InputError, match="a number of evaluations after @"):
        parse_baseline("ddim@", solvers)
    for text in ("ddim@6", "classical@6", "epd-00003@8"):
        with pytest.raises(InputError, match=rf"baseline '{text}': .* not compared at \d evaluations: add \d to --nfe"):
            parse_baseline(text, solvers)


def test_the_store_computes_once_and_again_where_a_file_is_broken(tmp_path):
    told, computed = [], []

    def compute():
        computed.append(1)
        return {"x": torch.arange(3)}

    store = Store(tmp_path, told.append)
    for _ in range(2):
        assert store.fetch({"a": 1, "b": [0.1]}, compute)["x"].tolist() == [0, 1, 2]
    assert len(computed) == 1
    store.fetch({"a": 2, "b": [0.1]}, compute)
    assert len(computed) == 2
    file = tmp_path / f"{key_of({'b': [0.1], 'a': 1})}.pt"
    for content in (file.read_bytes()[:50], b""):
        file.write_bytes(content)
        assert store.fetch({"a": 1, "b": [0.1]}, compute)["x"].tolist() == [0, 1, 2]
    assert len(computed) == 4
    assert [str(file) in line for line in told] == [True, True]


@pytest.fixture
def report(comparison, entries):
    return Report(
        comparison=comparison,
        differences=comparison.differences([Baseline("classical", None)]),
        reference=entries[4],
        real=np.zeros((2, 16, 16, 3), dtype=np.uint8),
        prompts=[f"prompt {index}" for index in range(ROWS)],
        settings={"model": "none", "guidance": 7.5},
    )


def test_the_csv_holds_every_schedule_and_marks_the_best(report, comparison):
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(lines) == 5 * 4
    for line in lines:
        cell_here = cell(comparison, line["label"], int(line["parallel_evaluations"]), line["metric"])
        best = cell_here.entry.solver.grid_name == line["schedule"]
        assert line["best"] == str(best)
        if best:
            assert float(line["estimate"]) == pytest.approx(cell_here.interval.estimate)
        assert float(line["low"]) <= float(line["estimate"]) <= float(line["high"])
    assert {line["total_evaluations"] for line in lines if line["label"] == "epd-00003"} == {"6"}


def test_the_json_holds_the_same_and_the_differences(report):
    content = json.loads(report.json())
    assert content["settings"] == {"model": "none", "guidance": 7.5}
    assert len(content["results"]) == 20
    assert len(content["differences"]) == len(report.differences)
    first = content["differences"][0]
    assert first["low"] <= first["estimate"] <= first["high"]
    assert content["reference"].keys() == {"reward", "frechet", "latent_rms", "pixel_rms"}


def test_the_table_names_schedules_and_counts_explosions(report):
    lines = [line.split("|") for line in report.table().splitlines()]
    assert len({len(line) for line in lines}) == 1
    ddim = next(line for line in lines if line[1].strip() == "ddim" and line[2].strip() == "4")
    assert ddim[4].strip().endswith("discrete g2.5")
    assert ddim[6].strip().endswith("logsnr g2.5")
    assert ddim[-2].strip() == f"0 to 3/{ROWS}"
    assert all(METRICS[name].meaning in report.markdown() for name in report.comparison.metrics)
    assert "(2000 resamples)" in report.markdown()


def test_the_difference_table_says_what_was_compared_with_what(report):
    (table,) = report.difference_tables()
    lines = {tuple(part.strip() for part in line.split("|")[1:3]): line.split("|") for line in table.splitlines()[2:]}
    assert lines["epd-00003", "4"][3].strip().endswith("better (heun, discrete g2.5)")
    assert lines["epd-00003", "4"][5].strip().endswith("better (ddim, logsnr g2.5)")
    assert lines["heun", "4"][3].strip() == "itself"
    assert ("ddim", "8") not in lines  # the only classical solver at 8


def test_what_two_baselines_say_alike_is_one_table(report, entries, tmp_path):
    plain = Comparison(entries[1:], FRECHET, Store(tmp_path / "kept", pytest.fail), seed=5)
    differences = plain.differences([Baseline("classical", None), Baseline("classical", TOTAL)])
    text = replace(report, comparison=plain, differences=differences).markdown()
    assert text.count("## Paired differences to") == text.count("to classical and classical@total\n") == 1


def test_everything_is_written(report, tmp_path):
    files = report.write(tmp_path / "out")
    assert sorted(file.name for file in files) == [
        *("grid-nfe04.png", "grid-nfe08.png", "metrics.png", "report.md", "results.csv", "results.json")
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    narrow, wide = (Image.open(tmp_path / "out" / f"grid-nfe{nfe}.png").size for nfe in ("08", "04"))
    assert wide[0] - narrow[0] == 2 * (128 + 8)  # three solvers at 4 evaluations, one at 8
    assert Image.open(tmp_path / "out" / "metrics.png").size[0] > 1000
    shown = re.findall(r"!\[.*\]\((.*)\)", (tmp_path / "out" / "report.md").read_text())
    assert shown == ["metrics.png", "grid-nfe04.png", "grid-nfe08.png"]


def test_a_sheet_goes_from_classical_solvers_over_ours_to_what_they_aim_at(report, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("training.measuring.report.write_sheet", lambda *arguments: drawn.append(arguments[3]))
    true_images = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    replace(report, real=true_images).write_sheets(tmp_path)
    *solvers, reference, real = drawn[0]
    assert [name.split(",")[0] for name in solvers] == ["ddim", "heun", "epd-00003"]
    assert solvers[-1].endswith("schedule, guidance 2.5")
    assert (reference, real) == (report.reference.solver.label, "true image")


def test_few_numbers_of_evaluations_are_a_list_of_solvers_and_more_an_axis(report, entries, tmp_path):
    few = report.plots().axes
    assert len(few) == len(report.comparison.metrics)
    assert [name.get_text() for name in few[0].get_yticklabels()] == [
        *("epd-00003, 4 (6 in all)", "ddim, 4 (4 in all)", "heun, 4 (4 in all)", "ddim, 8 (8 in all)")
    ]
    more = [*entries, entry("ddim", "ddim", "discrete", 20, reward=3.0, distance=0.01)]
    compared = Comparison(more, FRECHET, Store(tmp_path / "kept", pytest.fail), seed=5)
    parallel, total, *others = replace(report, comparison=compared).plots().axes
    assert len(others) == 2 * len(few) - 2
    for axes, counts in ((parallel, ["4", "8", "20"]), (total, ["4", "6", "8", "20"])):
        assert [name.get_text() for name in axes.get_xticklabels()] == counts
    compared = Comparison(more[1:], FRECHET, Store(tmp_path / "kept", pytest.fail), seed=5)
    axes = replace(report, comparison=compared).plots().axes  # of classical solvers both numbers are the same
    assert [panel.get_xlabel() for panel in axes[: len(few)]] == ["parallel NFE"] * len(few)
    assert len({panel.get_ylim() for panel in axes[: len(few)]}) == len(few)


def test_the_page_holds_everything_in_itself(report, comparison):
    asked = []

    def pictures(entry, rows):
        asked.append((entry.solver.label, list(rows)))
        return np.stack([np.full((16, 16, 3), row, dtype=np.uint8) for row in rows])

    text = evaluation_page(report, pictures, "torch 1234").decode()
    tags = [tag for tag in re.findall(r"<[^>]+>", text) if "src=" in tag or "href=" in tag]
    assert tags
    assert all('src="data:image/' in tag for tag in tags)
    (said,) = re.findall(r'<div class="verdict better"><b>(.*?)</b></div>', text)  # of the only one that is ours
    difference = found(report.differences, ("epd-00003", 4), "reward")
    assert said.startswith("epd-00003 with 4")
    assert "is better than heun with 4 (4 in all)" in said
    assert f"{difference.interval.estimate:+.3g}" in said
    extremes, first = (re.findall("<figcaption>(.*?)</figcaption>", part) for part in text.split("<details>"))
    # the reference is one of the rows here
    assert first == 2 * [f"{row.label}, {row.parallel} evaluations" for row in comparison.rows]
    assert extremes == 8 * ["epd-00003, 4 evaluations", "heun, 4 evaluations"]
    gains = difference.row.cells["reward"].entry.measured.values["reward"]
    gains = gains - difference.baseline_entry.measured.values["reward"]
    order = gains.argsort(descending=True).tolist()
    assert asked == [(label, [*order[:4], *order[-4:]]) for label in ("epd-00003", "heun")]
    values = [float(value) for value in re.findall(r'<td data-value="([^"]+)"', text)]
    assert len(values) == len(comparison.rows) * (2 + len(comparison.metrics))
    assert "torch 1234" in text
    assert "guidance: 7.5" in text


def test_published_figures_stand_in_their_cells(report):
    figure = Published("epd", 4, "reward", 0.2482, "a paper")
    without = [replace(figure, nfe=5), replace(figure, solver="dpm2"), replace(figure, metric="fid_clean")]
    beside = replace(report, published=(figure, *without))
    (line,) = [line for line in beside.table().splitlines() if "published: 0.2482" in line]
    assert line.startswith("| epd-00003 | 4 |")
    said = [line for line in beside.markdown().splitlines() if line.startswith("- published")]
    assert "preference reward 0.2482 (a paper)" in said[0]
    assert [line.endswith("; not measured here") for line in said] == [False, True, True, True]


def test_groups_of_prompts_have_means_of_their_own(report, entries):
    (table, *_) = replace(report, groups={"first": slice(0, 10), "second": slice(10, ROWS)}).group_tables()
    line = next(line for line in table.splitlines() if line.startswith("| epd-00003"))
    values = entries[0].measured.values["reward"]
    found = [float(cell.split("[")[0]) for cell in line.split("|")[3:5]]
    assert found == pytest.approx([values[:10].mean().item(), values[10:].mean().item()], rel=1e-3)
    assert report.group_tables() == []
