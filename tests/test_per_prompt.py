"""The study of choices by prompt, on scores of which it is known whether prompts have likings of their own."""

import pytest
import torch
from click.testing import CliRunner

from benchmarks import per_prompt
from benchmarks.per_prompt import chosen


@pytest.mark.parametrize("liking", [0.0, 0.3])
def test_a_choice_by_prompt_gains_where_prompts_differ_and_there_alone(liking):
    generator = torch.Generator().manual_seed(0)
    options = 0.1 * torch.randn(6, 1, 1, generator=generator)
    likings = liking * torch.randn(6, 400, 1, generator=generator)
    noise = torch.randn(6, 400, 8, generator=generator)
    choices, reliability = chosen((options + likings + noise).double())
    assert reliability == pytest.approx(liking**2 / (liking**2 + 1 / 4), abs=0.06)
    gain = (choices["by prompt"] - choices["for all"]).mean()
    assert gain > 0.06 if liking else abs(gain) < 0.02
    assert choices["by image"].mean() > choices["by prompt"].mean()


def test_the_command_prints_every_choice(monkeypatch):
    monkeypatch.setattr(per_prompt, "GUIDANCES", (1.0, 2.0))
    monkeypatch.setattr(per_prompt, "SCHEDULES", per_prompt.SCHEDULES[:1])
    result = CliRunner().invoke(per_prompt.main, ["--nfe", "1", "--number", "2", "--pairs", "1"])
    assert result.exit_code == 0, result.output
    said, *lines = result.stdout.splitlines()
    assert said.startswith("reliability")
    table = {line[:10].strip(): line[10:].split() for line in lines}
    assert list(table) == ["for all", "by prompt", "by image"]
    assert table["for all"][1] == "+0.0000"
    assert float(table["by image"][0]) >= max(float(table[name][0]) for name in ("for all", "by prompt"))
