"""How large pictures are, before any is decoded."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from crossalign.data.images.decode import header_size
from crossalign.data.sources import ImageListing, Raw

HEADERS = 2048
"""Pictures that are looked at, at the most."""


def image_sizes(listing: ImageListing) -> Counter[tuple[int, int]]:
    """How many of the pictures have which width and height, by the headers of the whole listing or of a part of it."""
    count = len(listing.labels)
    if len(listing.files) == count:
        raws: Iterable[Raw] = (listing.files[row] for row in range(0, count, -(-count // HEADERS)))
    else:
        raws = islice(listing.records(), HEADERS)
    return Counter(size for size in map(header_size, raws) if size is not None)
