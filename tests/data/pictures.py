"""Pictures and ways to open them, for tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from crossalign.config import DataConfig
from crossalign.data.images.load import ImageSet, ImageSplits, open_images


def png(seed: int, size: tuple[int, int] = (12, 12)) -> bytes:
    """A picture of noise, width x height."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(values))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


THREE = {"cat": 20, "ant": 15, "bee": 25}


def open_source(source: object, **settings: Any) -> ImageSplits:
    """Open a source with some settings."""
    return open_images(DataConfig(source=str(source), **settings))


def sizes(splits: ImageSplits) -> tuple[int, int, int]:
    """Images for training, validation and testing."""
    return len(splits.train), len(splits.validation), len(splits.test)


def check_rows(images: ImageSet, expected: Callable[[str], tuple[np.ndarray, str]]) -> None:
    """Each row holds the pixels and the class that its name says."""
    assert images.names is not None
    for row, name in enumerate(images.names):
        pixels, label = expected(name)
        assert np.array_equal(images.pixels[row], pixels) and images.classes[images.labels[row]] == label
