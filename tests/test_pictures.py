"""Values, images and pixels."""

from __future__ import annotations

import torch

from models.pictures import to_images


def test_decoded_values_become_images_in_range():
    assert to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_what_is_no_number_is_no_colour():
    assert to_images(torch.tensor([torch.inf, -torch.inf, torch.nan])).isnan().all()
