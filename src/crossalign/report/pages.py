"""Which blocks a page has, and in which order: one of runs and searches and a summary of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crossalign.report import opening, searches, tables
from crossalign.report.blocks import (
    Block,
    Code,
    Facts,
    Figure,
    Figures,
    Findings,
    Folded,
    Group,
    Heading,
    Only,
    Page,
    Prose,
    Samples,
    Table,
    Warnings,
)
from crossalign.report.contrasts import apart_table, means_table, question_tables, seeds_table
from crossalign.report.figures.classifiers import classifier_figures, confusion_counts, unfinished_figures
from crossalign.report.figures.search import search_figures
from crossalign.report.figures.texts import further_figures, text_figures
from crossalign.report.published import published_tables
from crossalign.report.searches import Lead, Section
from crossalign.report.words import counted, findings
from crossalign.results.contrasts import Pair, contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import BEFORE, FAMILIES, Outcome
from crossalign.results.questions import beside, image_pairs, text_pairs
from crossalign.results.rows import Row, best, warnings
from crossalign.runs.records import Run, Study

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Parts:
    """What is said by the kind of the runs."""

    lead: Lead
    findings: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = ()
    results: tuple[Table, ...] = ()
    comparisons: tuple[Table, ...] = ()
    efficiency: Table | None = None
    figures: tuple[Figure, ...] = ()
    best: Row | None = None
    """The row whose errors are looked at."""
    confusions: Table | None = None

    def named(self, start: str) -> Figures:
        """The figures whose name begins so."""
        return Figures(tuple(figure for figure in self.figures if figure.name.startswith(start)))


def study_page(study: Study) -> Page:
    """The page of runs and searches, with every figure that they have data for.

    Raises:
        UserError: image classifiers and language models in one report; matplotlib or SciPy is not installed.
    """
    results = Results(study)
    rows, single, sections = list(results.row.values()), _single(results), searches.sections_of(study.searches, study.complete)
    parts = _parts(results, rows)
    top = _opening(study, parts.lead, sections)
    cautions = Warnings(tuple(results.notes + warnings(study, rows)))
    groups = tables.parameter_table(single) if single else None
    title = parts.results[0].title if len(parts.results) == 1 else "Results"
    searched = f"Search{'' if len(sections) == 1 else 'es'} over settings"
    sweep, unfinished = tables.sweep_table(study), tables.incomplete_table(study.incomplete)
    blocks = [
        Prose((top.headline,), "lede"),
        Prose(tuple(top.remarks), "soft"),
        Prose(tuple(line for line in study.note.split("\n") if line.strip())),
        _html(Facts(tuple(top.facts)), cautions),
        Facts(opening.provenance(study), small=True),
        Only("markdown", (cautions,)),
        *_section("findings", "Findings", parts.findings, Findings(parts.findings)),
        *_section("results", title, parts.results, *parts.results, _html(parts.named("accuracy"))),
        *_section("comparisons", "Comparisons", parts.comparisons, _html(parts.named("differences")), *parts.comparisons),
        *_section("search", searched, sections, *_searches(sections, top)),
        Only("markdown", (Figures(parts.figures, "Figures"),)),
        *_section("curves", "Curves", parts.figures, _html(parts.named("curves"), parts.named("alignment"))),
        *_section("errors", "Where it is right and where it errs", parts.best, _html(*_errors(parts, single))),
        *_section("efficiency", "Efficiency", parts.efficiency, parts.efficiency, Group((groups,)) if groups else None),
        Only("markdown", (parts.confusions,) if parts.confusions else ()),
        *_section("sweep", "Learning-rate sweep", sweep, _html(parts.named("sweep")), sweep),
        *_section("incomplete", "Incomplete runs", unfinished, unfinished),
        *_section("settings", "Settings, environment, commands", True, *_settings(study, rows, single)),
    ]
    return Page(top.title, tuple(blocks), "report")


def _html(*blocks: Block) -> Only:
    return Only("html", blocks)


def _section(anchor: str, title: str, when: object, *blocks: Block | None) -> list[Block]:
    """A section of the HTML page; Markdown gathers figures, and has a heading over each table instead."""
    return [Heading(title, anchor), *(block for block in blocks if block)] if when else []


def _single(results: Results) -> Run | None:
    """The run, where a report is of one run."""
    runs = [run for row in results.row.values() for run in row.runs]
    return runs[0] if len(runs) == 1 else None


def _opening(study: Study, runs: Lead, sections: list[Section]) -> Lead:
    """What the page opens with: the searches, where all runs are of their winners, else the runs."""
    if sections:
        of_searches = all(any(search.trained(run.folder) for search in study.searches) for run in study.runs)
        runs = searches.lead(sections, runs, of_searches, any_run=bool(study.runs))
    return replace(runs, title=study.title or runs.title)


def _searches(sections: list[Section], top: Lead) -> list[Block]:
    """What each search came to, with its figures."""
    methods = searches.method_table(sections)
    blocks: list[Block] = [Group((methods,))] if methods else []
    for number, section in enumerate(sections, 1):
        search, suffix = section.search, (f"-{number}", f" of “{section.name}”") if len(sections) > 1 else ("", "")
        first, (figures, left_out) = searches.headline(search), search_figures(search, *suffix)
        if first != top.headline:
            blocks += [_html(Heading(search.title)), Only("markdown", (Heading(f"Search: {search.title}"),))]
            blocks += [Prose((first,)), Prose(tuple(searches.remarks(search, section.runs)), "soft")]
        blocks += [searches.rung_table(search), searches.trial_table(search)]
        blocks += [*(Figures((figure,)) for figure in figures[:-1]), Figures(tuple(figures[-1:]), notes=tuple(left_out))]
        blocks += [searches.failure_table(search)]
    return blocks


def _errors(parts: Parts, single: Run | None) -> list[Block]:
    """Confusions, reliability, and a few images with the answers of the best row."""
    if parts.best is None:
        return []
    beside: tuple[Block, ...] = (parts.confusions,) if parts.confusions else ()
    reliability = parts.named("reliability").figures
    blocks: list[Block] = [Group(beside + (reliability if single else ()), parts.named("confusion"))]
    blocks += [] if single else [Group(reliability)]
    samples = next((run for run in parts.best.runs if run.samples), parts.best.first).samples[:24]
    title = f"Test images and answers of “{parts.best.label}”"
    return [*blocks, Samples(title, tuple(samples))] if samples else blocks


def _settings(study: Study, rows: list[Row], single: Run | None) -> list[Block]:
    """What the runs can be made again with."""
    own = [str(run.environment.get("command") or "") for run in study.runs]
    commands = Code("Commands", tuple(dict.fromkeys([*study.commands, *filter(None, own)])))
    shared = tables.shared_settings(rows) if len(rows) > 1 else {}
    blocks: list[Block] = [
        _yaml("Resolved configuration", single.config if single else {}),
        Folded(tables.setting_table(rows)),
        _yaml("Settings that all rows share", shared),
        Folded(tables.environment_table(study.runs)),
        Folded(commands),
    ]
    return [block for block in blocks if not isinstance(block, Folded) or block.block]


def _yaml(title: str, values: dict[str, Any]) -> Only:
    import yaml

    text = str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return _html(*([Folded(Code(title, (text,)))] if values else []))


def summary_page(study: Study) -> Page:
    """What a terminal shows of runs and searches: the tables of results, without figures and tests.

    Raises:
        UserError: image classifiers and language models in one report.
    """
    results = Results(study)
    shown, unfinished = _results(results, _further_tests(results)), tables.incomplete_table(study.incomplete)
    blocks: list[Block] = []
    for section in searches.sections_of(study.searches, study.complete):
        search = section.search
        blocks += [Prose((search.title, searches.headline(search), *searches.remarks(search, section.runs), ""))]
        blocks += [replace(searches.rung_table(search), title="", notes=[]), Prose(("",))]
    for table in shown:
        blocks += [Prose((f"{table.title}:",))] if len(shown) > 1 else []
        blocks += [replace(table, title="", notes=[note for note in table.notes if not note.startswith("Bold")])]
    blocks += [Prose(tuple(results.notes))]
    if unfinished:
        blocks += [Prose(("", f"{unfinished.title}:")), replace(unfinished, title="", notes=[])]
    return Page("Summary", tuple(blocks))


def _parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of the runs, with every outcome that is of no kind of runs in particular."""
    study, kind, single = results.study, results.kind("report"), _single(results)
    title = f"{single.name}, seed {single.seed}" if single else rows[0].label if len(rows) == 1 else "Comparison of runs"
    if not rows:
        text = f"No run is complete: {counted(len(study.incomplete), 'run')} stopped before the end or still running."
        classified = [run for run in study.incomplete if any("accuracy" in line for line in run.metrics)]
        return Parts(Lead(title, text), figures=tuple(unfinished_figures(classified)))
    text = f"{counted(len(study.complete), 'run')} of {counted(len(rows), 'row')}."
    parts = Parts(Lead(title, text), efficiency=tables.efficiency_table(rows))
    if kind:
        parts = {"image classifiers": _image_parts, "language models": _text_parts}[kind](results, rows)
    tests = _further_tests(results)
    return replace(
        parts,
        lead=replace(parts.lead, title=title),
        results=_results(results, tests),
        comparisons=tuple(filter(None, (*parts.comparisons, seeds_table(results, tests)))),
        figures=(*parts.figures, *further_figures(results, tests)),
    )


def _further(results: Results) -> list[Outcome]:
    """The outcomes that no part of a page is about."""
    return [outcome for outcome in results.outcome.values() if outcome.family not in (*FAMILIES, BEFORE)]


def _further_tests(results: Results) -> DataFrame:
    """Every row beside the first in those outcomes."""
    first = next(iter(results.row), "")
    return contrasts(results, beside(results, first, _further(results)))


def _results(results: Results, further_tests: DataFrame) -> tuple[Table, ...]:
    """The tables of results: those of the kind of runs, and means of the outcomes that no other table has."""
    kind, further, own = results.kind("report"), _further(results), list[Table]()
    if kind == "image classifiers":
        own = [tables.accuracy_table(results), tables.forgetting_table(results)]
    elif kind:
        own = tables.text_tables(results)
    if further:
        means = means_table(results, list(results.row), further, further_tests, "seed")
        own.append(replace(means, title="Further outcomes" if kind else "Results"))
    return tuple(filter(None, own))


def _image_parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of image classifiers."""
    study, top, single = results.study, best(rows), _single(results)
    tests, apart = _asked(results, image_pairs(results))
    facts = opening.run_facts(single) if single else opening.image_facts(study, rows, top)
    counts = confusion_counts(top)
    return Parts(
        Lead("", opening.image_headline(rows, top), opening.image_remarks(top.first, bool(single)), facts),
        findings(results, tests),
        comparisons=(*published_tables(results), *question_tables(results, tests), apart),
        efficiency=tables.efficiency_table(rows),
        figures=tuple(classifier_figures(results, rows, tests)),
        best=top,
        confusions=tables.confusion_table(*counts, len(top.runs)) if counts else None,
    )


def _text_parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of language models that were trained on text."""
    tests, apart = _asked(results, text_pairs(results))
    return Parts(
        Lead("", opening.text_headline(results, tests), facts=opening.text_facts(results.study, rows)),
        findings(results, tests),
        comparisons=(*question_tables(results, tests), apart),
        efficiency=tables.efficiency_table(rows, "tokens_per_second"),
        figures=tuple(text_figures(results, tests)),
    )


def _asked(results: Results, pairs: Iterable[Pair]) -> tuple[DataFrame, Table]:
    """Contrasts of rows that differ in what is asked alone, and a table of the others."""
    asked = contrasts(results, pairs)
    return asked[asked.verdict != "apart"], apart_table(results, asked[asked.verdict == "apart"])
