"""One HTML file that holds everything: no script, no font, no picture from anywhere else."""

import base64
from pathlib import Path

from crossalign.core.errors import needed
from crossalign.report.blocks import Figure, Heading, Page
from crossalign.report.figures.drawing import svg


def html(page: Page) -> str:
    """The page as HTML text: what comes before the first heading, links to the sections, and the sections.

    Everything that runs bring along is escaped.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    jinja2 = needed("jinja2", "report", "writing a report's page")
    from markupsafe import Markup

    def drawing(figure: Figure) -> Markup:
        return Markup(svg(figure))

    def address(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode()

    blocks = list(page.of("html"))
    first = next((i for i, block in enumerate(blocks) if isinstance(block, Heading)), len(blocks))
    anchors = {block.anchor for block in blocks if isinstance(block, Heading)}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    parts = {"opening": blocks[:first], "sections": blocks[first:], "anchors": anchors}
    text: str = template.render(page=page, **parts, drawing=drawing, address=address)
    return text
