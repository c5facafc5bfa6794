"""How a figure is styled and written: inline SVG that follows the page's colours, or a small PNG file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crossalign.core.errors import needed
from crossalign.report.blocks import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED = "#1a1d21", "#8a9099"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the page lightens it on a dark background.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
PAPER = "#fefefe"
"""Behind text that lies on lines; the page makes it its own background."""
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
NAMES = "ink", "muted", "page", "blue", "orange", "green", "red", "purple", "sky"
VARIABLES = dict(zip((INK, MUTED, PAPER, *PALETTE), NAMES, strict=True))
"""What the page calls each colour, so that it can change them."""
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # class and run names are not ours: a dollar sign is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("grid.color", "axes.edgecolor"), MUTED),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save under the report's style, whatever the user's own matplotlib settings."""
    matplotlib = needed("matplotlib", "report", "drawing a report's figures")
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def clean(text: str, longest: int = 48) -> str:
    """A name fit for a figure: no control characters (XML forbids them), and not too long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def svg(figure: Figure) -> str:
    """The figure as SVG for the inside of a page, in the page's colour variables, with no reference to the outside."""
    with styled():
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": figure.name}):
            written = io.StringIO()
            metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="0 0 ([0-9.]+) [0-9.]+"', head)
    assert view is not None, "matplotlib writes a viewBox"
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', body))  # an id is kept where something points to it
    body = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", body)
    width = float(view.group(1)) * 1.55  # points to pixels, somewhat larger than life
    return f'<svg {view.group()} style="max-width: {width:.0f}px" aria-hidden="true" focusable="false">{body}'


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a PNG file on white, in 256 colours: fewer make lines of one colour out of two.

    They are chosen to cover what occurs: by count, a lone red cross would come out in the orange of a hundred lines.
    """
    from PIL import Image

    large, small = io.BytesIO(), io.BytesIO()
    with styled():
        figure.figure.savefig(large, format="png", dpi=dpi, facecolor="white")
    Image.open(large).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(small, format="PNG", optimize=True)
    return small.getvalue()


def name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Name the places of a dot plot, first at the top."""
    axes.set_yticks(range(len(labels)), [clean(label, 90) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
