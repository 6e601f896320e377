"""The columns of an evaluation's table: what each metric is called, which way is better, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """A column of the table: its heading, which way is better, and what it is."""

    heading: str
    higher_is_better: bool
    meaning: str


_FID = (
    "Fréchet distance of InceptionV3's 2,048 features to real images, resized {}; the interval is that of its "
    "expectation at this number of images, to real images as they are"
)
_KID = "squared maximum mean discrepancy of the same features with a cubic kernel, unbiased, over all pairs"
METRICS: Mapping[str, Metric] = {
    "reward": Metric("preference reward", True, "mean score of the preference model, raw"),
    "verifier": Metric(
        "verifier score", True, "mean share of a caption's parts that the exact verifier confirms, in [0, 1]"
    ),
    "verified": Metric("whole caption", True, "share of images of which the verifier confirms the whole caption"),
    "frechet": Metric(
        "Fréchet distance",
        False,
        "between Gaussians fitted to unit-length image features of the preference model, squared feature units; the "
        "interval is that of its expectation at this number of images",
    ),
    "fid_clean": Metric("FID, clean resizing", False, _FID.format("antialiased bicubic, as clean-fid does")),
    "fid_legacy": Metric("FID, legacy resizing", False, _FID.format("by the network itself, without antialiasing")),
    "kid_clean": Metric("KID, clean resizing", False, _KID),
    "kid_legacy": Metric("KID, legacy resizing", False, _KID),
    "cmmd": Metric(
        "CMMD",
        False,
        "1,000 times the squared maximum mean discrepancy of CLIP ViT-L/14-336 features, unit-length, to real images",
    ),
    "latent_rms": Metric(
        "latent RMS", False, "root mean square difference of the final latents from the reference of the same noise"
    ),
    "pixel_rms": Metric("pixel RMS", False, "the same of the 8-bit images, in units of the range [0, 1]"),
}
"""The metrics that have names of their own; rewards beside the first go by theirs."""


def metric_of(name: str) -> Metric:
    """A metric by its name; one that is not in `METRICS` is a reward."""
    return METRICS.get(name) or Metric(name, True, f"mean score of the reward {name}, raw")
