"""The report: one self-contained page that shows what the run logged."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from errors import InputError
from models.pictures import as_png
from training.ppo.assembly import make_policy, prepare
from training.ppo.checkpoint import save_checkpoint, table_to_plain
from training.ppo.config import load_config
from training.ppo.ppo_trainer import METRICS
from training.ppo.report import DIAGNOSTICS, write_report
from training.ppo.tests.test_export_predictor import state_of
from training.ppo.tests.tiny_world import write_world
from training.ppo.training_run import preview_name
from training.runs.checkpoint import step_path
from training.runs.run_folder import MetricsLog, RunFolder

PROMPT = 'a <b>bold</b> "quote" & more'


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    return prepare(load_config(write_world(tmp_path_factory.mktemp("world"))))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, start) -> tuple[RunFolder, "Page"]:
    """A run of two steps with two evaluations, and its page."""
    folder = make_run(tmp_path_factory.mktemp("reported"), start)
    return folder, read(folder)


class Page(HTMLParser):
    """Tags in order, the sources of images, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str | None] = []
        self.sources: list[str] = []
        self.text = ""
        self.captions: list[str] = []  # of the strip's images
        self.references: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            assert values["alt"]
            self.sources.append(values["src"])
        self.references += [value for name, value in attributes if name in ("href", "src", "srcset") and value]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
            self.classes.append(values.get("class"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["figcaption"] and "pictures" in self.classes:
            self.captions.append(data)


def make_run(tmp_path: Path, start, *, evaluations: bool = True, hacked: bool = False) -> RunFolder:
    folder = RunFolder.create(tmp_path, "run", "")
    folder.config.write_text("run: {}\n")
    save_checkpoint(step_path(folder.checkpoints, 2), state_of(start, make_policy(start), 2))
    table = {name: part.tolist() for name, part in table_to_plain(start.table).items()}
    log = MetricsLog(folder.metrics)
    for step in range(3):
        row = {"step": step, "table": table}
        if step:
            row |= {name: 0.5 for name in METRICS if name != "step"} | {"images": 8 * step, "dropped_groups": 0}
            row |= {"seconds/network": 0.9, "seconds/reward": 0.05, "seconds/step": 1.0}
        if evaluations and step in (0, 2):
            row |= heldout(step, hacked)
            for number in range(2):
                image = Image.new("RGB", (16, 16), (40 * step, 0, 0))
                story = {"prompt": PROMPT, "seed": str(number), "step": str(step)}
                (folder.samples / preview_name(step, number)).write_bytes(as_png(image, story))
        log.append(row)
    return folder


def heldout(step: int, hacked: bool) -> dict:
    values = {"": 0.01 * step, "_low": 0.004 * step, "_high": 0.016 * step}
    return {
        "heldout/reward": 0.7 + 0.01 * step,
        "heldout/reward_start": 0.7,
        "heldout/panel": 0.6,
        "heldout/panel_start": 0.6,
        **{f"heldout/{judge}_difference{end}": value for judge in ("reward", "panel") for end, value in values.items()},
        "heldout/dropped": 0,
        "heldout/best_step": step,
        "heldout/suspected_reward_hacking": int(hacked and step > 0),
    }


def read(folder: RunFolder) -> Page:
    page = Page(write_report(folder).read_text())
    assert page.open == []
    return page


def test_page_stands_alone(reported):
    _, page = reported
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    for source in page.sources:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.+)", source).groups()
        content = base64.b64decode(data, validate=True)
        assert content.startswith(b"\x89PNG" if kind == "png" else b"<?xml")


def test_the_page_opens_with_a_verdict_in_words(reported):
    said = reported[1].text.partition("Before and after")[0]
    for sentence in (
        "Better than its start: reward +0.0200",
        "On 6 held-out prompts, after step 2, the training reward is 0.7200, 0.7000 at the start: +0.0200, 95% "
        "interval [+0.0080, +0.0320].",
        "which is never trained on: better, +0.0200",
        "The tuning took 16 images, 96 network evaluations and 2 s",  # 2 intervals of an evaluation and 2 points
    ):
        assert sentence in said
    assert "Suspected" not in said
    assert "That step is the best" not in said  # of one there is no choice


@pytest.mark.parametrize(
    ("ends", "headline"),
    [
        ((-0.01, 0.02), "No gain that can be told from chance: reward +0.0200"),
        ((-0.03, -0.01), "Worse than its start: reward +0.0200"),
    ],
)
def test_a_verdict_goes_by_the_interval(tmp_path: Path, start, ends, headline):
    folder = make_run(tmp_path, start)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rows[-1] |= dict(zip(("heldout/reward_difference_low", "heldout/reward_difference_high"), ends, strict=True))
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert headline in read(folder).text


@pytest.mark.parametrize(("best", "said"), [(2, True), (1, True), (0, False)])
def test_a_step_that_was_chosen_among_several_is_said_to_be(tmp_path: Path, start, best: int, said: bool):
    folder = make_run(tmp_path, start)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rows[1] |= heldout(1, hacked=False)
    rows[2] |= {"heldout/best_step": best, "heldout/dropped": 2 if best == 2 else 0}
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read(folder).text
    assert ("That step is the best of 2 by these same prompts" in text) == said
    assert ("On 4 held-out prompts (2 more have a score that is not finite, and are left out), after" in text) == (
        best == 2
    )


def test_the_classical_solver_and_the_reference_stand_beside_it(tmp_path: Path, start):
    folder = make_run(tmp_path, start)
    path = step_path(folder.checkpoints, 2)
    save_checkpoint(path, state_of(start, make_policy(start), 2) | {"watch": {"classical_name": "ddim, discrete"}})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    rows[-1] |= {"heldout/classical": 0.71, "heldout/classical_difference": 0.01}
    rows[-1] |= {"heldout/classical_difference_low": -0.02, "heldout/classical_difference_high": 0.03}
    panel = "heldout/classical_panel_difference"
    rows[-1] |= {panel: -0.2, f"{panel}_low": -0.3, f"{panel}_high": -0.1}
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("classical", "reference"):
        for number in range(2):
            content = as_png(Image.new("RGB", (16, 16)), {"prompt": PROMPT, "seed": "0"})
            (folder.samples / preview_name(name, number)).write_bytes(content)
    page = read(folder)
    assert "Better than its start: reward +0.0200; not told from the best classical solver" in page.text
    assert "(ddim, discrete, 6 evaluations, reward 0.7100): not told apart, +0.0100" in page.text
    assert "By the panel: worse, -0.2000, 95% interval [-0.3000, -0.1000]." in page.text
    labels = ["start", "tuned (step 2)", "best classical (ddim, discrete, 6 evaluations)", "reference (50 evaluations)"]
    assert page.captions == 2 * labels


def test_the_next_commands_are_there_to_copy(reported):
    folder, page = reported
    assert f"python -m training.ppo.export_epd_predictor {folder.path} --best" in page.text
    assert f"sample.py --predictor_path {folder.path}" in page.text
    assert f"--predictor_path {folder.path} --nfe 4 --prompt-file PROMPTS.csv" in page.text
    assert f'custom_pipeline="{folder.path}/export/diffusers"' in page.text


def test_commands_can_be_copied_where_a_folder_has_spaces(tmp_path: Path, start):
    folder = make_run(tmp_path / "my runs", start)
    text = read(folder).text
    assert f"sample.py --predictor_path '{folder.path}' --prompt" in text
    assert f"python -m training.ppo.export_epd_predictor '{folder.path}' --best" in text


def test_diagnostics_are_folded_at_the_end(reported):
    content = reported[0].report.read_text()
    folded = content.index("<details>")
    assert "object-fit" not in content
    assert all(content.index(title) < folded for title in ("Before and after", "The solver", "What next"))
    assert all(content.index(title) > folded for title in ("Diagnostics", "Configuration", "Where a step"))


def test_same_prompts_before_and_after(reported):
    folder, page = reported
    embedded = [base64.b64decode(source.split(",")[1]) for source in page.sources if "image/png" in source]
    expected = [(folder.samples / preview_name(step, number)).read_bytes() for number in range(2) for step in (0, 2)]
    assert embedded == expected
    assert page.captions == 2 * ["start", "tuned (step 2)"]
    assert page.text.count(PROMPT) == 2  # as text: what is in a prompt is no markup


def test_a_preview_that_is_no_png_of_ours_costs_its_row_and_no_more(tmp_path: Path, start):
    folder = make_run(tmp_path, start)
    Image.new("RGB", (16, 16)).save(folder.samples / preview_name(2, 1), format="jpeg")
    page = read(folder)
    assert sum("image/png" in source for source in page.sources) == 2


def test_a_damaged_preview_costs_its_row_and_no_more(tmp_path: Path, start):
    folder = make_run(tmp_path, start)
    damaged = folder.samples / preview_name(2, 1)
    damaged.write_bytes(damaged.read_bytes()[:60])
    page = read(folder)
    assert page.text.count(PROMPT) == 1


def test_time_and_table_in_numbers(reported):
    text = reported[1].text
    assert "90.0%" in text
    assert "1.00 s a step" in text
    assert "0.3000 → 0.3000" in text


def test_suspected_hacking_is_said(tmp_path: Path, start):
    assert "Suspected reward hacking at step 2" in read(make_run(tmp_path, start, hacked=True)).text


def test_run_without_held_out_evaluation(tmp_path: Path, start):
    page = read(make_run(tmp_path, start, evaluations=False))
    assert "Before and after" not in page.text
    assert "Diagnostics" in page.text


def test_run_that_was_interrupted_before_its_first_step(tmp_path: Path, start):
    folder = RunFolder.create(tmp_path, "run", "")
    save_checkpoint(step_path(folder.checkpoints, 0), state_of(start, make_policy(start), 0))
    folder.metrics.touch()
    assert "0 of 4 steps" in read(folder).text


def test_every_plotted_diagnostic_is_a_documented_metric():
    assert set(DIAGNOSTICS) <= METRICS.keys()


def test_run_without_checkpoint(tmp_path: Path):
    folder = RunFolder.create(tmp_path, "run", "")
    folder.metrics.touch()
    with pytest.raises(InputError, match="before its first checkpoint"):
        write_report(folder)


def test_same_run_same_page(reported):
    folder, _ = reported
    first = folder.report.read_bytes()
    assert write_report(folder).read_bytes() == first


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
