"""Which blocks a page has, and in which order: one of runs and searches and a summary of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from crossalign.report import classifiers, tables, text, words
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
from crossalign.report.contrasts import apart_tables, means_table, question_tables, seeds_table, text_table
from crossalign.report.figures.classifiers import classifier_figures, confusion_counts, unfinished_figures
from crossalign.report.figures.search import search_figures
from crossalign.report.figures.texts import further_figures, text_figures
from crossalign.report.forgetting import forgetting_tables
from crossalign.report.published import published_tables
from crossalign.report.search_tables import failure_table, method_table, rung_table, trial_table
from crossalign.report.searches import Lead, Section, headline, lead, remarks, sections_of
from crossalign.report.words import findings
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.outcomes import BEFORE, FAMILIES, Outcome
from crossalign.results.questions import beside, image_pairs, text_pairs
from crossalign.results.rows import Row, best, warnings
from crossalign.runs.records import Run, Study


@dataclass(frozen=True)
class Parts:
    """What is said by the kind of the runs."""

    headline: str
    remarks: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
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
    rows, doubles = list(results.row.values()), results.notes
    parts = _parts(results, rows)
    single, sections = _single(rows), sections_of(study.searches, study.complete)
    opening = _opening(study, Lead(_title(rows), parts.headline, parts.remarks, parts.facts), sections)
    cautions = Warnings(tuple(doubles + warnings(study, rows)))
    groups = tables.parameter_table(single) if single else None
    titles = (
        parts.results[0].title if len(parts.results) == 1 else "Results",
        f"Search{'' if len(sections) == 1 else 'es'} over settings",
    )
    sweep, unfinished = tables.sweep_table(study), tables.incomplete_table(study.incomplete)
    blocks = [
        Prose((opening.headline,), "lede"),
        Prose(tuple(opening.remarks), "soft"),
        Prose(tuple(line for line in study.note.split("\n") if line.strip())),
        _html(Facts(tuple(opening.facts)), cautions),
        Facts(_provenance(study), small=True),
        Only("markdown", (cautions,)),
        *_section("findings", "Findings", parts.findings, Findings(parts.findings)),
        *_section("results", titles[0], parts.results, *parts.results, _html(parts.named("accuracy"))),
        *_section("comparisons", "Comparisons", parts.comparisons, _html(parts.named("differences")), *parts.comparisons),
        *_section("search", titles[1], sections, *_searches(sections, opening)),
        Only("markdown", (Figures(parts.figures, "Figures"),)),
        *_section("curves", "Curves", parts.figures, _html(parts.named("curves"), parts.named("alignment"))),
        *_section("errors", "Where it is right and where it errs", parts.best, _html(*_errors(parts, single))),
        *_section("efficiency", "Efficiency", parts.efficiency, parts.efficiency, Group((groups,)) if groups else None),
        Only("markdown", (parts.confusions,) if parts.confusions else ()),
        *_section("sweep", "Learning-rate sweep", sweep, _html(parts.named("sweep")), sweep),
        *_section("incomplete", "Incomplete runs", unfinished, unfinished),
        *_section("settings", "Settings, environment, commands", True, *_settings(study, rows, single)),
    ]
    return Page(opening.title, tuple(blocks), "report")


def _html(*blocks: Block) -> Only:
    return Only("html", blocks)


def _section(anchor: str, title: str, when: object, *blocks: Block | None) -> list[Block]:
    """A section of the HTML page; Markdown gathers figures, and has a heading over each table instead."""
    return [Heading(title, anchor), *(block for block in blocks if block is not None)] if when else []


def _single(rows: list[Row]) -> Run | None:
    """The run, where a report is of one run."""
    return rows[0].first if len(rows) == 1 and len(rows[0].runs) == 1 else None


def _title(rows: list[Row]) -> str:
    single = _single(rows)
    if single is not None:
        return f"{single.name}, seed {single.seed}"
    return rows[0].label if len(rows) == 1 else "Comparison of runs"


def _opening(study: Study, runs: Lead, sections: list[Section]) -> Lead:
    """What the page opens with: the searches, where all runs are of their winners, else the runs."""
    if sections:
        of_searches = all(any(search.trained(run.folder) for search in study.searches) for run in study.runs)
        runs = lead(sections, runs, of_searches, any_run=bool(study.runs))
    return replace(runs, title=study.title or runs.title)


def _searches(sections: list[Section], opening: Lead) -> list[Block]:
    """What each search came to, with its figures."""
    methods = method_table(sections)
    blocks: list[Block] = [Group((methods,))] if methods is not None else []
    for number, section in enumerate(sections, 1):
        search, suffix = section.search, (f"-{number}", f" of “{section.name}”") if len(sections) > 1 else ("", "")
        first, (figures, left_out) = headline(search), search_figures(search, *suffix)
        if first != opening.headline:
            blocks += [_html(Heading(search.title)), Only("markdown", (Heading(f"Search: {search.title}"),))]
            blocks += [Prose((first,)), Prose(tuple(remarks(search, section.runs)), "soft")]
        blocks += [rung_table(search), *([trial_table(search)] if search.ranked else [])]
        blocks += [*(Figures((figure,)) for figure in figures[:-1]), Figures(tuple(figures[-1:]), notes=tuple(left_out))]
        blocks += [failure_table(search)] if search.failed else []
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
    differing = tables.setting_table(rows) if rows else None
    environment = tables.environment_table(study.runs)
    own = [str(run.environment.get("command") or "") for run in study.runs]
    commands = tuple(dict.fromkeys([*study.commands, *filter(None, own)]))
    blocks: list[Block] = [_html(*_yaml("Resolved configuration", single.config))] if single else []
    blocks += [Folded(differing)] if differing is not None else []
    blocks += [_html(*_yaml("Settings that all rows share", tables.shared_settings(rows)))] if len(rows) > 1 else []
    blocks += [Folded(environment)] if environment is not None else []
    return [*blocks, Folded(Code("Commands", commands))] if commands else blocks


def _yaml(title: str, values: dict[str, Any]) -> list[Block]:
    import yaml

    return [Folded(Code(title, (str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)),)))] if values else []


def summary_page(study: Study) -> Page:
    """What a terminal shows of runs and searches: the tables of results, without figures and tests.

    Raises:
        UserError: image classifiers and language models in one report.
    """
    results = Results(study)
    shown = RESULTS[results.kind("report")](results)
    unfinished = tables.incomplete_table(study.incomplete)
    blocks: list[Block] = []
    for section in sections_of(study.searches, study.complete):
        search = section.search
        blocks += [Prose((search.title, headline(search), *remarks(search, section.runs), ""))]
        blocks += [replace(rung_table(search), title="", notes=[]), Prose(("",))]
    for table in shown:
        blocks += [Prose((f"{table.title}:",))] if len(shown) > 1 else []
        blocks += [replace(table, title="", notes=[note for note in table.notes if not note.startswith("Bold")])]
    blocks += [Prose(tuple(results.notes))]
    if unfinished is not None:
        blocks += [Prose(("", f"{unfinished.title}:")), replace(unfinished, title="", notes=[])]
    return Page("Summary", tuple(blocks))


def _parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of the runs, with every outcome that is of no kind of runs in particular."""
    study = results.study
    if not rows:
        count = words.counted(len(study.incomplete), "run")
        told = f"No run is complete: {count} stopped before the end or still running."
        classified = [run for run in study.incomplete if any("accuracy" in line for line in run.metrics)]
        return Parts(told, figures=tuple(unfinished_figures(classified)))
    makers = {"image classifiers": _image_parts, "language models": _text_parts}
    parts = makers.get(results.kind("report"), _plain_parts)(results, rows)
    further = _further(results)
    if not further:
        return parts
    tests = contrasts(results, beside(results, rows[0].label, further))
    return replace(
        parts,
        comparisons=(*parts.comparisons, *([seeds_table(results, tests)] if len(tests) else [])),
        figures=(*parts.figures, *further_figures(results, tests)),
    )


def _further(results: Results) -> list[Outcome]:
    """The outcomes that no part of a page is about."""
    return [outcome for outcome in results.outcome.values() if outcome.family not in (*FAMILIES, BEFORE)]


def _further_results(results: Results) -> tuple[Table, ...]:
    """Means of the outcomes that no other table has."""
    further = _further(results)
    tests = contrasts(results, ())
    table = means_table(results, list(results.row), further, tests, "seed")
    return (replace(table, title="Further outcomes" if results.kind("report") else "Results"),) if further else ()


def _plain_parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of runs that are of no known kind."""
    told = f"{words.counted(len(results.study.complete), 'run')} of {words.counted(len(rows), 'row')}."
    return Parts(told, results=_further_results(results), efficiency=tables.efficiency_table(rows))


def _image_results(results: Results) -> tuple[Table, ...]:
    return (classifiers.results_table(results), *forgetting_tables(results), *_further_results(results))


def _image_parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of image classifiers."""
    study = results.study
    every, top, single = contrasts(results, image_pairs(results)), best(rows), _single(rows)
    tests, apart = every[every.verdict != "apart"], every[every.verdict == "apart"]
    remarks = [classifiers.chance(top.first), classifiers.calibration(single) if single else ""]
    counts = confusion_counts(top)
    return Parts(
        classifiers.headline(rows, top),
        tuple(filter(None, remarks)),
        tuple(_run_facts(single) if single else _study_facts(study, rows, top)),
        findings(results, tests),
        _image_results(results),
        (*published_tables(results), *question_tables(results, tests), *apart_tables(results, apart)),
        tables.efficiency_table(rows),
        tuple(classifier_figures(study, rows, tests)),
        top,
        tables.confusion_table(*counts, len(top.runs)) if counts else None,
    )


def _run_facts(run: Run) -> list[tuple[str, str]]:
    return [
        ("test accuracy", f"{words.percent(run.number('test', 'accuracy'), 1)} %"),
        ("calibration error", f"{words.percent(run.number('test', 'ece'), 1)} %"),
        ("best epoch", f"{run.number('best_epoch'):g} of {run.number('epochs'):g}"),
        ("parameters that train", words.number(run.number("parameters", "trainable"), 0)),
        ("training", words.duration(run.number("seconds", "train"))),
        ("peak memory", words.size(run.number("peak_memory_bytes"))),
    ]


def _study_facts(study: Study, rows: list[Row], top: Row) -> list[tuple[str, str]]:
    seeds = sorted({len(row.runs) for row in rows})
    return [
        ("best validation accuracy", f"{words.percent(top.mean('validation', 'accuracy').mean, 1)} %"),
        ("its test accuracy", f"{words.percent(top.mean('test', 'accuracy').mean, 1)} %"),
        ("rows", str(len(rows))),
        ("seeds a row", " to ".join(dict.fromkeys((str(seeds[0]), str(seeds[-1]))))),
        ("test images", words.number(top.first.number("test", "n"), 0)),
        ("time of all runs", _time(study, "align", "train")),
    ]


def _time(study: Study, *stages: str) -> str:
    seconds = [run.number("seconds", stage) for run in study.complete for stage in stages]
    return words.duration(sum(s for s in seconds if s == s))


def _text_results(results: Results) -> tuple[Table, ...]:
    models = text.groups(results)
    titles = [f"Results: {name}" for name in models] if len(models) > 1 else ["Results"] * len(models)
    own = (text.results_table(title, group) for title, group in zip(titles, models.values(), strict=True))
    return (*own, *_further_results(results))


RESULTS = {"image classifiers": _image_results, "language models": _text_results, "": _further_results}
"""The tables of results of each kind of runs."""


def _text_parts(results: Results, rows: list[Row]) -> Parts:
    """What is said of language models that were trained on text."""
    study = results.study
    every, models = contrasts(results, text_pairs(results)), list(text.groups(results).values())
    tests, apart = every[every.verdict != "apart"], every[every.verdict == "apart"]
    facts = [
        ("rows", str(len(rows))),
        ("runs", str(len(study.complete))),
        ("parameters", ", ".join(words.number(group[0].first.number("parameters", "total"), 0) for group in models)),
        ("tokens a run", ", ".join(words.number(group[0].first.number("tokens"), 0) for group in models)),
        ("time of all runs", _time(study, "train")),
    ]
    return Parts(
        text.headline(results, tests),
        facts=tuple(facts),
        findings=findings(results, tests),
        results=_text_results(results),
        comparisons=(*([text_table(results, tests)] if len(tests) else []), *apart_tables(results, apart)),
        efficiency=tables.efficiency_table(rows, "tokens_per_second"),
        figures=tuple(text_figures(results, tests)),
    )


def _provenance(study: Study) -> tuple[tuple[str, str], ...]:
    """Data, seeds, hardware, commit and time of the runs, each as distinct values."""
    runs = study.complete or study.runs
    pairs = [
        ("Data", _distinct(run.text("data") for run in runs)),
        ("Seeds", _distinct(str(seed) for seed in sorted({run.seed for run in runs}))),
        ("Device", _distinct(run.text("device") for run in runs)),
        ("Hardware", _distinct(_hardware(run.environment) for run in runs)),
        ("Commit", _distinct(_commit(run.environment) for run in runs)),
        ("Started", _span(str(run.environment.get("started") or "") for run in runs)),
    ]
    return tuple((name, value) for name, value in pairs if value)


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, values)))


def _span(times: Iterable[str]) -> str:
    known = sorted(filter(None, times))
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else ""


def _hardware(environment: dict[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    parts = [tables.plain(gpu) for gpu in gpus] if isinstance(gpus, list) else [str(gpus)]
    parts += [str(environment.get("cpu") or "")]
    for key, unit in (("cores", "cores"), ("threads", "threads"), ("memory_bytes", "memory")):
        parts += [f"{tables.plain(environment[key], key)} {unit}"] if environment.get(key) else []
    return ", ".join(filter(None, parts))


def _commit(environment: dict[str, Any]) -> str:
    changed = " with uncommitted changes" if environment.get("git_changed") else ""
    return f"{environment.get('git_commit') or 'not recorded'}{changed}"
