"""How large images and patches are, where that is left open, and what a run says before its long work."""

from collections import Counter

from crossalign.config import AdaptConfig
from crossalign.core.progress import announce
from crossalign.data.images.load import list_images
from crossalign.data.images.sizes import image_sizes
from crossalign.data.sources import Listings
from crossalign.models.classifier.embedding import MOST_TOKENS, fitting_patch
from crossalign.models.classifier.model import ImageClassifier
from crossalign.runs.folder import resolved

LARGEST = 224
"""Side of images that are larger, where no size is given."""
MANY_TOKENS = 1024
GRID = int(MOST_TOKENS**0.5)


def sized(config: AdaptConfig, listings: Listings | None = None) -> AdaptConfig:
    """``config`` with the size of images and patches that was left open, by what the headers of the pictures say.

    Pictures that are all of one size keep it where patches divide it and make at most 256 tokens; others become squares, as
    large as their shorter side and 224 pixels let them be. A patch of 4 pixels is kept as long as it makes no more tokens.
    """
    side, patch, kind = config.data.image_size, config.embedder.patch, config.embedder.kind
    if side is None:
        listings = list_images(config.data) if listings is None else listings
        sizes = sum(map(image_sizes, listings.values()), Counter[tuple[int, int]]())
        own = next(iter(sizes)) if len(sizes) == 1 else None
        if not sizes or (own and _fits(own, patch, kind)):
            return resolved(config, embedder={"patch": patch or fitting_patch(kind, own or ()) or 4})
        shorter = sorted(min(size) for size in sizes.elements())
        side = min(LARGEST, shorter[len(shorter) // 2])
        step = patch or (GRID if side >= 4 * GRID else 4)
        side = max(step, min(side, GRID * patch if patch else side) // step * step)
    return resolved(config, data={"image_size": side}, embedder={"patch": patch or fitting_patch(kind, (side, side)) or 4})


def _fits(size: tuple[int, int], patch: int | None, kind: str) -> bool:
    """Whether pictures of this size can stay as they are."""
    if patch is None:
        return max(size) <= LARGEST and fitting_patch(kind, size) is not None
    return size[0] * size[1] // patch**2 <= MOST_TOKENS  # one that does not divide them is the user's to mend


def outline(config: AdaptConfig, listings: Listings) -> str:
    """What is trained on what, from names and headers alone: the data, the tokens of an image, and which parameters train.

    More tokens than the backbone was trained on, or than 1,024, are warned of, with the patch that would do.

    Raises:
        UserError: the backbone is not there, or cannot take so many tokens.
    """
    train, side = listings["train"], config.data.image_size
    sizes = image_sizes(train)
    (width, height), _ = sizes.most_common(1)[0] if sizes else ((32, 32), 0)
    own = f"{width}x{height}" if len(sizes) == 1 else f"{len(sizes)} sizes, mostly {width}x{height}"
    shape = (side, side) if side else (height, width)
    model = ImageClassifier.from_backbone(
        config.backbone.ref,
        classes=train.classes,
        input_shape=(1 if config.data.channels == "gray" else 3, *shape),
        **{section: getattr(config, section) for section in ("backbone", "embedder", "tune", "head")},
        weights=False,
    )
    tokens, limit = model.embedding.tokens, getattr(model.language_model.config, "max_position_embeddings", MANY_TOKENS)
    limit = min(limit or MANY_TOKENS, MANY_TOKENS)
    if tokens > limit:
        patch = fitting_patch(config.embedder.kind, shape, limit)
        announce(
            f"{tokens:,} tokens an image are more than {limit:,}, which '{config.backbone.ref}' was trained on or a step takes "
            f"long for: {f'--embedder.patch {patch} would do' if patch else 'change --data.image-size'}"
        )
    count = sum(len(listing.labels) for listing in listings.values())
    return (
        f"{train.title}: {count:,} images of {len(train.classes)} classes, of {own} pixels; as {shape[1]}x{shape[0]} in "
        f"patches of {config.embedder.patch}: {tokens:,} tokens an image\n{model.plan}"
    )
