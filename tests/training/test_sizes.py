"""A folder of photographs: the size of images and patches is chosen from their headers, and said before long work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossalign.config import AdaptConfig
from crossalign.data.images.load import list_images
from crossalign.models.classifier.embedding import fitting_patch
from crossalign.runs.folder import resolved
from crossalign.verbs.adapt.sizes import outline, sized


def pictures(folder: Path, *sizes: tuple[int, int], **save: Any) -> AdaptConfig:
    """The settings for two classes of ten pictures each, of these sizes in turn."""
    for number in range(20):
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", sizes[number % len(sizes)], (number, 0, 0)).save(path, **save)
    config = AdaptConfig()
    config.data.source = str(folder)
    return config


@pytest.mark.parametrize(
    ("sizes", "side", "patch"),
    [
        ([(8, 8)], None, 4),
        ([(32, 32)], None, 4),
        ([(28, 28)], None, 4),
        ([(64, 48)], None, 4),
        ([(128, 128)], None, 8),
        ([(192, 192)], None, 12),
        ([(31, 31)], 28, 4),
        ([(640, 480)], 224, 14),
        ([(500, 375), (375, 500)], 224, 14),
        ([(100, 90), (70, 120), (200, 101)], 80, 5),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sizes_and_patches_follow_the_pictures(
    tmp_path: Path, sizes: list[tuple[int, int]], side: int | None, patch: int, kind: str
) -> None:
    config = resolved(pictures(tmp_path, *sizes), embedder={"kind": kind})
    chosen = sized(config)
    if kind == "linear":
        assert (chosen.data.image_size, chosen.embedder.patch) == (side, patch)
    height, width = (chosen.data.image_size,) * 2 if chosen.data.image_size else sizes[0]
    assert chosen.embedder.patch and not (height % chosen.embedder.patch or width % chosen.embedder.patch)
    assert 4 <= height * width / chosen.embedder.patch**2 <= 256
    again = sized(chosen)
    assert (again.data, again.embedder) == (chosen.data, chosen.embedder)


@pytest.mark.parametrize(
    ("size", "given", "side", "patch"),
    [
        ((192, 192), {"patch": 2}, 32, 2),
        ((192, 192), {"patch": 16}, None, 16),
        ((640, 480), {"patch": 8}, 128, 8),
        ((640, 480), {"patch": 40}, None, 40),
        ((640, 480), {"image_size": 96}, 96, 6),
        ((640, 480), {"image_size": 96, "patch": 4}, 96, 4),
        ((8, 8), {"patch": 3}, None, 3),
    ],
)
def test_what_is_given_is_kept(
    tmp_path: Path, size: tuple[int, int], given: dict[str, int], side: int | None, patch: int
) -> None:
    config = pictures(tmp_path, size)
    config.data.image_size, config.embedder.patch = given.get("image_size"), given.get("patch")
    chosen = sized(config)
    assert (chosen.data.image_size, chosen.embedder.patch) == (side, patch)


def test_upright_sizes_are_meant(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    config = pictures(tmp_path, (64, 32), exif=exif)
    assert "of 32x64 pixels; as 32x64 in patches of 4: 128 tokens" in outline(sized(config), list_images(config.data))


def test_many_tokens_are_warned_of_with_the_patch_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama: Path
) -> None:
    config = resolved(pictures(tmp_path, (96, 96)), backbone={"ref": str(tiny_llama)}, embedder={"patch": 2})
    config.data.image_size = 96
    said = outline(sized(config), list_images(config.data))
    assert "2,304 tokens an image" in said and "norms" in said
    assert "--embedder.patch" in (warning := capsys.readouterr().err) and " would do" in warning
    config.embedder.patch = 8
    outline(config, list_images(config.data))
    assert capsys.readouterr().err == ""


def test_a_patch_that_fits_divides_all_sides() -> None:
    rng = np.random.default_rng(0)
    for sides in rng.integers(1, 700, (200, 2)).tolist():
        patch = fitting_patch("linear", sides)
        assert patch is None or (not any(side % patch for side in sides) and sides[0] * sides[1] / patch**2 <= 256)
