"""A reward is anybody's code: what it raises, and what else it may answer than scores."""

from __future__ import annotations

import pytest
import torch

from errors import InputError
from training.measuring.scoring import scores_by


class Answer:
    """A reward that gives this answer."""

    name = "mine"

    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


IMAGES, PROMPTS = torch.zeros(3, 3, 2, 2), ["a", "b", "c"]


def test_scores_come_as_they_are():
    scores = torch.tensor([1.0, torch.nan, torch.inf])
    assert scores_by(Answer(scores), IMAGES, PROMPTS) is scores


@pytest.mark.parametrize(
    "error", [KeyError("prompt"), RuntimeError("first\nsecond"), AssertionError(), OSError(5, "x")]
)
def test_what_a_reward_raises_is_told_in_a_line(error):
    with pytest.raises(InputError, match=rf"the reward mine failed on 3 images: {type(error).__name__}") as caught:
        scores_by(Answer(error), IMAGES, PROMPTS)
    assert "(test_scoring.py, line " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [None, [1.0, 2.0, 3.0], torch.zeros(2), torch.zeros(3, 1), torch.tensor(0.0)])
def test_what_is_no_score_an_image_is_refused(answer):
    with pytest.raises(InputError, match=r"the reward mine gave .* for 3 images, not a tensor \[3\]"):
        scores_by(Answer(answer), IMAGES, PROMPTS)


@pytest.mark.parametrize("error", [InputError("ours"), MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_what_others_know_how_to_tell_passes(error):
    with pytest.raises(type(error)) as caught:
        scores_by(Answer(error), IMAGES, PROMPTS)
    assert caught.value is error


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
