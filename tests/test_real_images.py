"""Features of images, statistics of folders as files, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from errors import InputError
from models import asset_table
from models.inception import Inception, resized
from scripts import image_statistics
from tests.test_distances import scipy_frechet
from tests.tiny_inception import WIDTH, put_extractors
from training.measuring import real_images
from training.measuring.distances import cmmd_values, kid_values
from training.measuring.real_images import RealImages, folder_features, load_extractors, parse_distances


@pytest.fixture(autouse=True)
def extractors_are_there(monkeypatch, tmp_path):
    put_extractors(monkeypatch, tmp_path / "root")


def pixels(seed, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path):
    """Seven images, one of another size, one in grey; a broken one, and a hidden one."""
    path = tmp_path / "real"
    (path / "more").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(pixels(number, 24, 24, 3).numpy()).save(path / "more" / f"{number}.png")
    Image.fromarray(pixels(6, 40, 30).numpy()).save(path / "grey.png")
    (path / "broken.jpg").write_bytes(b"no image")
    (path / ".hidden.png").write_bytes(b"")
    return path


def read(folder):
    files = [folder / "grey.png", *sorted((folder / "more").iterdir())]
    return [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).movedim(-1, 0)[None] for file in files]


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (512, 512), (480, 640), (37, 900)])
def test_clean_resizing_is_pillows(size):
    image = pixels(1, 3, *size)
    expected = [
        np.asarray(Image.fromarray(part.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
        for part in image
    ]
    torch.testing.assert_close(
        resized(image[None].float())[0], torch.from_numpy(np.stack(expected)).clamp(0, 255), atol=0.02, rtol=0
    )


def test_the_two_ways_of_resizing_are_the_layers_alone_and_the_whole_network():
    images = pixels(2, 3, 3, 80, 80)
    network = torch.jit.load(asset_table.ROOT / asset_table.INCEPTION.path).eval()
    clean = network.layers((resized(images.float()) - 128) / 128).flatten(1)
    torch.testing.assert_close(Inception("cpu").features(images), clean)
    legacy = network(images.float(), return_features=True)
    torch.testing.assert_close(Inception("cpu", "legacy").features(images), legacy)
    assert clean.shape == (3, WIDTH)
    assert (clean - legacy).abs().max() > 1e-4
    assert not Inception("cpu").features(images).requires_grad


@pytest.mark.parametrize("resize", ["clean", "legacy"])
def test_a_statistics_file_is_what_numpy_says_of_the_features(folder, tmp_path, resize):
    result = CliRunner().invoke(
        image_statistics.main, [str(folder), "--resize", resize, "--batch", "4", "--out", str(tmp_path / "out.npz")]
    )
    assert result.exit_code == 0, result.output
    features = torch.cat([Inception("cpu", resize).features(image) for image in read(folder)]).double().numpy()
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_allclose(file["mu"], features.mean(0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(features.T), rtol=1e-3, atol=1e-9)
    assert "1 files are skipped" in result.output
    assert "broken.jpg cannot be read" in result.output
    assert "7 images of 2 sizes, each resized" in result.output
    assert f"7 images, fid, {resize} resizing" in result.output
    assert "FID of 7 images, fewer than 2,048, is mostly bias" in result.output


def test_distances_to_a_folder_and_to_its_file_are_the_same_and_the_definitions(folder, tmp_path):
    extractors = load_extractors(["fid", "kid", "cmmd"], "clean", "cpu")
    real = RealImages.of("here", folder_features(folder, extractors, 3, print), extractors)
    real.save(tmp_path / "real.npz", ["fid", "kid", "cmmd"])
    kept = RealImages.load(tmp_path / "real.npz")
    kept.check(["fid", "kid", "cmmd"], extractors)
    assert kept.count == 7
    drawn = pixels(9, 5, 3, 24, 24)
    inception, clip = (extractor.features(drawn) for extractor in extractors)
    theirs = real.features["inception_clean"]
    expected = scipy_frechet(inception.double().numpy(), theirs.double().numpy())
    assert real.values("fid", inception).mean().item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(real.values("kid", inception), kid_values(inception, theirs))
    torch.testing.assert_close(real.values("cmmd", clip), cmmd_values(clip, real.features["clip"]))
    torch.testing.assert_close(clip.norm(dim=1), torch.ones(5))
    for distance, features in (("fid", inception), ("kid", inception), ("cmmd", clip)):
        torch.testing.assert_close(kept.values(distance, features), real.values(distance, features))


def test_files_of_other_code_are_read_and_hold_enough_for_fid_only(tmp_path):
    np.savez(tmp_path / "public.npz", mu=np.zeros(WIDTH, np.float32), sigma=np.eye(WIDTH))
    real = RealImages.load(tmp_path / "public.npz")
    extractors = load_extractors(["fid", "kid"], "legacy", "cpu")
    real.check(["fid"], extractors)
    features = extractors[0].features(pixels(3, 4, 3, 16, 16))
    white = torch.randn(5000, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    assert real.values("fid", features).mean() > real.values("fid", white).mean()
    with pytest.raises(InputError, match=r"no features of inception, which KID needs"):
        real.check(["kid"], extractors)


def test_statistics_of_another_network_resizing_or_width_are_refused(folder, tmp_path, monkeypatch):
    extractors = load_extractors(["fid"], "clean", "cpu")
    RealImages.of("here", folder_features(folder, extractors, 3, print), extractors).save(tmp_path / "a.npz", ["fid"])
    real = RealImages.load(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"is of inception_clean .*choose its --resize"):
        real.check(["fid"], load_extractors(["fid"], "legacy", "cpu"))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(InputError, match=f"are of 9 features, and inception_clean has {WIDTH} here"):
        RealImages.load(tmp_path / "wide.npz").check(["fid"], extractors)
    np.savez(tmp_path / "other.npz", other=np.zeros(3))
    with pytest.raises(InputError, match="holds no mu and sigma"):
        RealImages.load(tmp_path / "other.npz").check(["fid"], extractors)


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.array(["a", "b"]), "sigma": np.eye(2)},
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, content):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(InputError, match="must be finite numbers"):
        RealImages.load(tmp_path / "bad.npz")


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    numbers = {"mu": np.zeros(200), "sigma": np.zeros((200, 200))}
    np.savez_compressed(tmp_path / "small.npz", **numbers)
    assert (tmp_path / "small.npz").stat().st_size < 10_000
    RealImages.load(tmp_path / "small.npz")
    monkeypatch.setattr(real_images, "LARGEST_UNPACKED", 100_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(InputError, match=r"no readable statistics file: it unpacks to 321,\d+ bytes"):
        RealImages.load(tmp_path / "small.npz")


def test_files_that_are_no_archives_or_hold_code_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("mu")
    np.savez(tmp_path / "code.npz", mu=np.array([print], dtype=object))
    for name in ("text", "code"):
        with pytest.raises(InputError, match="no readable statistics file"):
            RealImages.load(tmp_path / f"{name}.npz")
    with pytest.raises(InputError, match=r"no such statistics file; make it:  .* --out .*\.npz"):
        RealImages.load(tmp_path / "none.npz")


def test_folders_without_enough_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    extractors = load_extractors(["fid"], "clean", "cpu")
    with pytest.raises(InputError, match="holds no image"):
        folder_features(tmp_path / "empty", extractors, 4, print)
    with pytest.raises(InputError, match="no such folder"):
        folder_features(tmp_path / "none", extractors, 4, print)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no image")
    said = []
    with pytest.raises(InputError, match="0 images can be read"):
        folder_features(tmp_path / "empty", extractors, 4, said.append)
    assert "broken.png cannot be read" in said[0]


def test_a_network_that_is_missing_or_another_is_not_loaded(monkeypatch):
    path = asset_table.ROOT / asset_table.INCEPTION.path
    monkeypatch.setattr(torch.jit, "load", None)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"its SHA256 is .* instead of"):
        Inception("cpu")
    path.unlink()
    with pytest.raises(InputError, match=r"python -m models.assets fetch inception"):
        Inception("cpu")
    (asset_table.ROOT / asset_table.CLIP_336[0].path).unlink()
    with pytest.raises(InputError, match=r"python -m models.assets fetch clip336"):
        load_extractors(["cmmd"], "clean", "cpu")


def test_distances_are_parsed():
    assert parse_distances("fid, cmmd,fid") == ["fid", "cmmd"]
    with pytest.raises(InputError, match="unknown distance 'fud'; known are fid, kid, cmmd"):
        parse_distances("fud")
