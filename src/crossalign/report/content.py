"""What a report says, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

from crossalign.report import tables, wording
from crossalign.report.blocks import Figure
from crossalign.report.figures import confusion_counts, draw, draw_unfinished
from crossalign.report.forgetting import forgetting_tables
from crossalign.report.published import published_tables
from crossalign.report.search_tables import Lead, Section, lead, sections_of
from crossalign.results.comparisons import Comparison, compare_rows
from crossalign.results.rows import Row, best, group_rows, warnings
from crossalign.runs.records import Run, Study


class Content:
    """A study's rows, comparisons, tables and pictures, each made once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.rows, self.duplicates = group_rows(study)
        self.warnings = self.duplicates + warnings(study, self.rows)
        self._prepare()

    def _prepare(self) -> None:
        self.comparisons: list[Comparison] = compare_rows(self.rows)
        self.top: Row | None = best(self.rows) if self.rows else None

    @property
    def single(self) -> Run | None:
        """The run, where the report is of one run."""
        return self.rows[0].first if len(self.rows) == 1 and len(self.rows[0].runs) == 1 else None

    @cached_property
    def searches(self) -> list[Section]:
        """What each search over settings found."""
        return sections_of(self.study.searches, self.study.complete)

    @property
    def lead(self) -> Lead:
        """What the report opens with: the searches, where all runs are of their winners, else the runs."""
        runs, study = Lead(self.title, self.headline, self.remarks, self.facts), self.study
        if not study.searches:
            return runs
        of_searches = all(any(search.holds(run) for search in study.searches) for run in study.runs)
        found = lead(self.searches, runs, of_searches, any_run=bool(study.runs))
        return replace(found, title=study.title or found.title)

    @property
    def title(self) -> str:
        if self.study.title:
            return self.study.title
        if self.single:
            return f"{self.single.name}, seed {self.single.seed}"
        return self.rows[0].label if len(self.rows) == 1 else "Comparison of runs"

    @property
    def headline(self) -> str:
        if self.top is None:
            count = wording.counted(len(self.study.incomplete), "run")
            return f"No run is complete: {count} stopped before the end or still running."
        return wording.headline(self.rows, self.top)

    @property
    def remarks(self) -> list[str]:
        """Sentences beside the headline: chance, and calibration of a single run."""
        if self.top is None:
            return []
        said = [wording.chance(self.top.first)] + ([wording.calibration(self.single)] if self.single else [])
        return [sentence for sentence in said if sentence]

    @property
    def findings(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        return wording.findings(self.comparisons)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """A few numbers to meet first, as (name, value)."""
        if self.top is None:
            return []
        run = self.single
        if run is not None:
            return [
                ("test accuracy", f"{wording.percent(run.number('test', 'accuracy'), 1)} %"),
                ("calibration error", f"{wording.percent(run.number('test', 'ece'), 1)} %"),
                ("best epoch", f"{run.number('best_epoch'):g} of {run.number('epochs'):g}"),
                ("parameters that train", wording.number(run.number("parameters", "trainable"), 0)),
                ("training", wording.duration(run.number("seconds", "train"))),
                ("peak memory", wording.size(run.number("peak_memory_bytes"))),
            ]
        seeds = sorted({len(row.runs) for row in self.rows})
        seconds = [run.number("seconds", key) for run in self.study.complete for key in ("align", "train")]
        return [
            ("best validation accuracy", f"{wording.percent(self.top.mean('validation', 'accuracy').mean, 1)} %"),
            ("its test accuracy", f"{wording.percent(self.top.mean('test', 'accuracy').mean, 1)} %"),
            ("rows", str(len(self.rows))),
            ("seeds a row", " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1]))))),
            ("test images", wording.number(self.top.first.number("test", "n"), 0)),
            ("time of all runs", wording.duration(sum(s for s in seconds if s == s))),
        ]

    @property
    def results(self) -> list[tables.Table]:
        return [tables.results_table(self.rows), *forgetting_tables(self.rows)] if self.rows else []

    @property
    def efficiency(self) -> tables.Table | None:
        return tables.efficiency_table(self.rows) if self.rows else None

    @property
    def comparison_tables(self) -> list[tables.Table]:
        return [*published_tables(self.rows), *tables.comparison_tables(self.comparisons)]

    @property
    def confusion(self) -> tables.Table | None:
        held = confusion_counts(self.top) if self.top else None
        return tables.confusion_table(*held, len(self.top.runs)) if held and self.top else None

    @cached_property
    def pictures(self) -> list[Figure]:
        if not self.rows:
            return draw_unfinished(self.study.incomplete)
        return draw(self.study, self.rows, self.comparisons)

    @property
    def provenance(self) -> list[tuple[str, str]]:
        """Data, seeds, hardware, commit and time of the runs, each as distinct values."""
        runs = self.study.complete or self.study.runs
        held = [
            ("Data", distinct(run.text("data") for run in runs)),
            ("Seeds", distinct(str(seed) for seed in sorted({run.seed for run in runs}))),
            ("Device", distinct(run.text("device") for run in runs)),
            ("Hardware", distinct(hardware(run.environment) for run in runs)),
            ("Commit", distinct(commit(run.environment) for run in runs)),
            ("Started", span(str(run.environment.get("started") or "") for run in runs)),
        ]
        return [(name, value) for name, value in held if value]

    @property
    def commands(self) -> list[str]:
        """The study's own commands, then each run's."""
        own = [str(run.environment.get("command") or "") for run in self.study.runs]
        return list(dict.fromkeys([*self.study.commands, *filter(None, own)]))


def distinct(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return "; ".join(dict.fromkeys(value for value in values if value))


def span(values: Iterable[str]) -> str:
    """The first and the last of some times."""
    held = sorted(value for value in values if value)
    return " to ".join(dict.fromkeys((held[0], held[-1]))) if held else ""


def hardware(environment: dict[str, Any]) -> str:
    """What an environment says of the machine, on one line."""
    gpus = environment.get("gpus") or []
    parts = [tables.plain(gpu) for gpu in gpus] if isinstance(gpus, list) else [str(gpus)]
    parts += [str(environment.get("cpu") or "")]
    for key, unit in (("cores", "cores"), ("threads", "threads"), ("memory_bytes", "memory")):
        parts += [f"{tables.plain(environment[key], key)} {unit}"] if environment.get(key) else []
    return ", ".join(filter(None, parts))


def commit(environment: dict[str, Any]) -> str:
    """The commit that a run was made with."""
    changed = " with uncommitted changes" if environment.get("git_changed") else ""
    return f"{environment.get('git_commit') or 'not recorded'}{changed}"
