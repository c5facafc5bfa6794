"""One HTML file that holds everything: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from crossalign.core.errors import missing_extra
from crossalign.report import drawing, tables
from crossalign.report.content import Content
from crossalign.report.search_tables import method_table
from crossalign.results.rows import Row
from crossalign.runs.records import Run


def page(content: Content) -> str:
    """The report as HTML text. Everything that runs bring along is escaped.

    Raises:
        UserError: jinja2, matplotlib or SciPy is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise missing_extra("jinja2", "report", "writing a report's page") from error
    pictures = [*content.pictures, *(picture for section in content.searches for picture in section.drawn[0])]
    figures = {
        picture.name: {"title": picture.title, "alt": picture.alt, "svg": Markup(drawing.svg(picture))} for picture in pictures
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(content=content, figures=figures, **_parts(content))


def _parts(content: Content) -> dict[str, Any]:
    rows, study = content.rows, content.study
    return {
        "lead": content.lead,
        "searches": content.searches,
        "methods": method_table(content.searches),
        "curved": bool(content.pictures),
        "results": content.results,
        "comparisons": content.comparison_tables,
        "efficiency": content.efficiency,
        "parameters": tables.parameter_table(content.single) if content.single else None,
        "sweep": tables.sweep_table(study),
        "incomplete": tables.incomplete_table(study.incomplete),
        "settings": tables.setting_table(rows) if rows else None,
        "shared": _yaml(tables.shared_settings(rows)) if len(rows) > 1 else "",
        "config": _yaml(content.single.config) if content.single else "",
        "environment": tables.environment_table(study.runs),
        "samples": _samples(content.top) if content.top else [],
    }


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)) if values else ""


def _samples(row: Row) -> list[dict[str, Any]]:
    run: Run = next((run for run in row.runs if run.samples), row.first)
    return [
        {
            "source": "data:image/png;base64," + base64.b64encode(sample.png).decode(),
            "label": sample.label,
            "predicted": sample.predicted,
            "confidence": f"{100 * sample.confidence:.0f} %",
            "right": sample.label == sample.predicted,
        }
        for sample in run.samples[:24]
    ]
