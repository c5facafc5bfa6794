"""The report of a search over settings, from records that the real rule of promotion made of synthetic curves."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from searches import SPACE, Record, make_search

from crossalign.core.errors import UserError
from crossalign.report import report, summary_table
from crossalign.report.blocks import Facts, Figure, Figures, Page, Prose
from crossalign.report.figures.drawing import INK, RED, png
from crossalign.report.figures.search import importances
from crossalign.report.pages import study_page
from crossalign.report.render.markdown import markdown
from crossalign.report.searches import (
    Section,
    budgets,
    facts,
    failure_table,
    headline,
    method_table,
    remarks,
    rung_table,
    sections_of,
    trial_table,
)
from crossalign.results.rows import group_rows
from crossalign.runs.records import open_study
from crossalign.runs.search import read_search

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A finished search of 64 trials without any run of its winner; read only."""
    folder = tmp_path_factory.mktemp("search") / "lora"
    return folder, make_search(folder)


def opened(*folders: Path) -> list[Section]:
    study = open_study(list(folders))
    return sections_of(study.searches, study.complete)


def page_of(*folders: Path) -> Page:
    return study_page(open_study(list(folders)))


def opening(page: Page) -> tuple[str, str, dict[str, str]]:
    """The first sentence, the remarks as one text, and the numbers to meet first."""
    lede, remarks, *_ = (block for block in page.blocks if isinstance(block, Prose))
    facts = next(block for block in page.of("html") if isinstance(block, Facts))
    return lede.lines[0], " ".join(remarks.lines), dict(facts.pairs)


def drawn(folder: Path, name: str) -> tuple[Any, Figure]:
    """The axes of a figure of the one search in ``folder``, laid out, and the figure."""
    figures = [figure for block in page_of(folder).blocks if isinstance(block, Figures) for figure in block.figures]
    figure = next(figure for figure in figures if figure.name == name)
    png(figure)
    return figure.figure.axes[0], figure


def cells(rows: list[list[str]], column: int) -> list[str]:
    return [row[column] for row in rows]


def test_the_table_of_rungs_counts_what_the_record_holds(searched: tuple[Path, Record]) -> None:
    folder, record = searched
    table = rung_table(read_search(folder / "search.json"))
    assert cells(table.rows, 1) == ["7", "13", "25", "50"]
    for rung, row in enumerate(table.rows):
        scores = [t["rungs"][rung]["score"] for t in record["trials"] if len(t["rungs"]) > rung]
        failed = sum(t["state"] == "failed" and len(t["rungs"]) == rung for t in record["trials"])
        later = sum(len(t["rungs"]) + (t["state"] == "failed") > rung + 1 for t in record["trials"])
        assert row[2:7] == [str(len(scores) + failed), str(failed), "0", str(len(scores)), str(later) if rung < 3 else "–"]
        assert row[7:9] == [f"{100 * max(scores):.2f}", f"{100 * np.median(scores):.2f}"]
    assert cells(table.rows, 3) == ["4", "0", "0", "0"]


def test_a_failure_in_a_later_rung_is_one_of_the_promoted(tmp_path: Path) -> None:
    make_search(tmp_path, 16, fail=lambda number: 2)
    search = read_search(tmp_path / "search.json")
    first, second, *later = rung_table(search).rows
    assert first[3] == "0" and first[6] == second[2] == second[3] != "0" and second[5] == "0"
    assert all(row[2] == "0" for row in later) and search.winner is None and search.over
    assert set(cells(failure_table(search).rows, 1)) == {"2"} and len(failure_table(search).rows) == int(second[3])


def test_the_best_trials_are_those_of_the_highest_rung_then_score(searched: tuple[Path, Record]) -> None:
    folder, record = searched
    table = trial_table(read_search(folder / "search.json"))
    reached = [t for t in record["trials"] if t["rungs"]]
    expected = sorted(reached, key=lambda t: (len(t["rungs"]), t["rungs"][-1]["score"]), reverse=True)
    assert cells(table.rows, 0) == [str(t["number"]) for t in expected[:10]]
    assert table.rows[0][0] == str(record["winner"]) and table.strong == {0}
    assert table.rows[0][2] == f"{100 * expected[0]['curve'][-1]:.2f}"
    rank = table.columns.index("lora rank")
    assert cells(table.rows, rank) == [str(t["settings"].get("tune.lora_rank", "–")) for t in expected[:10]]
    assert "–" in cells(table.rows, rank)


def test_a_higher_rung_goes_before_a_higher_score(tmp_path: Path) -> None:
    record = make_search(tmp_path, 16)
    early = next(t for t in record["trials"] if t["state"] == "paused" and len(t["rungs"]) == 1)
    early["rungs"][0]["score"] = 0.999
    (tmp_path / "search.json").write_text(json.dumps(record))
    shown = trial_table(read_search(tmp_path / "search.json")).rows
    rungs = [int(cell) for cell in cells(shown, 1)]
    assert shown[0][0] == str(record["winner"]) and rungs == sorted(rungs, reverse=True) and rungs[-1] == 1


def test_of_losses_the_lowest_is_best(tmp_path: Path) -> None:
    record = make_search(tmp_path, 32, loss=True)
    search = read_search(tmp_path / "search.json")
    scores = [t["rungs"][0]["score"] for t in record["trials"] if t["rungs"]]
    assert rung_table(search).rows[0][7] == f"{min(scores):.4f}"
    final = {t["number"]: t["rungs"][-1]["score"] for t in record["trials"] if t["state"] == "complete"}
    assert trial_table(search).rows[0][0] == str(min(final, key=lambda n: final[n])) == str(record["winner"])
    assert "evaluations" in headline(opened(tmp_path)[0].search) and "%" not in trial_table(search).columns[2]


def test_the_page_says_what_chose_and_what_it_cost(searched: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = searched
    page = report([folder], html=tmp_path / "page.html", markdown=tmp_path / "tables.md").read_text().replace("\u00a0", " ")
    text = (tmp_path / "tables.md").read_text()
    best = 100 * max(t["curve"][-1] for t in record["trials"] if t["state"] == "complete")
    spent = sum(len(t["curve"]) for t in record["trials"])
    for said in (
        f"{best:.2f} %. It spent {spent:,} of the 3,200 epochs", f"{100 - 100 * spent / 3200:.0f} % less",
        "Validation chose, among 64 configurations: the best validation score of so many is optimistic.",
        "none of which is finished here", "Failed: 4 of 64: the loss is not finite at step 120. What they did not train counts",
        "where all trials had the same training",
    ):  # fmt: skip
        assert said in page and said in text, said
    names = ["search-curves", "search-importance", "search-rate", "search-rungs", "search-settings"]
    assert sorted(path.stem for path in (tmp_path / "tables-figures").iterdir()) == names
    assert page.count("<figure>") == 5 and 'id="curves"' not in page and "Incomplete runs" not in page + text


def test_trials_are_no_runs(searched: tuple[Path, Record], new_run: Maker, tmp_path: Path) -> None:
    folder, _ = searched
    assert open_study([folder]).runs == []
    assert len(open_study([folder / "trials" / "0000"]).incomplete) == 1  # named itself, it is one
    new_run(tmp_path / "other" / "trials" / "run")  # a folder of that name without search.json beside it
    assert len(open_study([tmp_path / "other"]).complete) == 1
    both = open_study([folder, folder])
    assert len(both.searches) == 1


def test_the_winners_runs_are_reported_as_runs(tmp_path: Path, new_run: Maker) -> None:
    make_search(tmp_path / "s", 8, fail=lambda number: 99)
    for seed in (1, 2, 3):
        new_run(tmp_path / "s" / "winner" / f"seed-{seed}", "LoRA", method="lora", seed=seed)
    new_run(tmp_path / "s" / "winner" / "seed-4", "LoRA", method="lora", seed=4, complete=False)
    study, page = open_study([tmp_path / "s"]), page_of(tmp_path / "s")
    (row,), _ = group_rows(study)
    accuracy = [run.number("test", "accuracy") for run in row.runs]
    error = np.std(accuracy, ddof=1) / math.sqrt(3)
    _, remarks, facts = opening(page)
    assert facts[f"the winner on test data, ± {100 * error:.2f}"] == f"{100 * np.mean(accuracy):.2f} %"
    assert page.title == "ASHA over LoRA" and "classified" in remarks
    assert "only for the winner's runs (3 seeds)" in remarks
    text = markdown(page)
    assert "## Test results" in text and "## Rungs" in text and text.count("Incomplete runs") == 1
    assert [run.seed for run in study.incomplete] == [4]
    told = summary_table([tmp_path / "s"])
    assert "ASHA over LoRA" in told and "Reached its end" in told and "Incomplete runs" in told


def test_winners_of_one_name_keep_their_own_runs(tmp_path: Path, new_run: Maker) -> None:
    """They are one row of one seed to the table of results, which leaves the older out."""
    for place, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        make_search(folder, 8)
        new_run(folder / "winner" / "seed-1", "LoRA", method="lora", seed=1, skill=0.3 + 0.3 * place)
    study = open_study([tmp_path])
    table = method_table(opened(tmp_path))
    assert len(group_rows(study)[0]) == 1 and table is not None and cells(table.rows, 0) == ["LoRA (a)", "LoRA (b)"]
    accuracy = [f"{100 * run.number('test', 'accuracy'):.2f} %" for run in study.complete]
    assert cells(table.rows, 7) == accuracy and len(set(accuracy)) == 2 and cells(table.rows, 8) == ["1", "1"]


def test_the_winner_of_a_text_run_is_scored_on_texts_that_chose_nothing(tmp_path: Path) -> None:
    for name in ("plain", "scored"):
        make_search(tmp_path / name, 8, loss=True, row=name)
        for seed in (1, 2):
            (folder := tmp_path / name / "winner" / f"seed-{seed}").mkdir(parents=True)
            scores = {"validation": {"loss": 2.5}} | ({"new.txt": {"loss": 2.6 + seed / 10}} if name == "scored" else {})
            result = {"verb": "pretrain", "row": name, "seed": seed, "test": None, "scores": scores, "backbone": "gpt2-1x8"}
            (folder / "result.json").write_text(json.dumps(result))
    plain, scored = opened(tmp_path)
    table = method_table([plain, scored])
    assert table is not None and cells(table.rows, 7) == ["–", "loss 2.7500 ± 0.0500 on new.txt"]
    assert dict(facts(scored.search, scored.runs))["the winner's loss on new.txt, ± 0.0500"] == "2.7500"
    assert (
        "(2 seeds) scored no test data" in remarks(plain.search, plain.runs)[-1]
        and "winner's runs (2 seeds)" in remarks(scored.search, scored.runs)[-1]
    )
    report([tmp_path], html=tmp_path / "page.html")


def test_a_space_that_holds_no_more_ends_a_search(tmp_path: Path) -> None:
    make_search(tmp_path, 12, asked=64)
    assert "64 were asked for: the space seems to hold no more." in remarks(opened(tmp_path)[0].search, [])
    assert not any("to come" in text.get_text() for text in drawn(tmp_path, "search-rungs")[0].texts)


def test_searches_of_several_methods_stand_beside_each_other(tmp_path: Path, new_run: Maker) -> None:
    records = {}
    for place, (row, method) in enumerate((("FPT", "fpt"), ("LoRA", "lora"))):
        records[row] = make_search(tmp_path / method, 16 + 16 * place, seed=place, row=row)
        for seed in (1, 2):
            new_run(tmp_path / method / "winner" / f"seed-{seed}", row, method=method, seed=seed, skill=0.4 + 0.2 * place)
    (tmp_path / "lora" / "search.json").write_text(json.dumps(records["LoRA"] | {"alignment_epochs": 480}))
    study, sections = open_study([tmp_path]), opened(tmp_path)
    assert any(
        "480 epochs of alignment, which no rung counts" in said for said in remarks(sections[1].search, sections[1].runs)
    )
    again = 100 * np.mean([run.number("validation", "accuracy") for run in sections[1].runs])
    assert f"With fresh seeds the winner's is {again:.2f} % in place of" in " ".join(
        remarks(sections[1].search, sections[1].runs)
    )
    table = method_table(sections)
    assert table is not None and cells(table.rows, 0) == ["FPT", "LoRA"]
    for (name, record), told in zip(records.items(), table.rows, strict=True):
        winner, count = record["trials"][record["winner"]], len(record["trials"])
        accuracy = [100 * run.number("test", "accuracy") for run in study.complete if run.name == name]
        beside = " and 480 of alignment" if name == "LoRA" else ""
        assert told[1:4] == [str(count), str(count // 16), f"{record['epochs']} epochs{beside}"]
        assert told[5:7] == [f"{winner['settings']['optim.lr']:.3g}", f"validation accuracy {100 * winner['curve'][-1]:.2f} %"]
        assert told[7] == f"{np.mean(accuracy):.2f} ± {np.std(accuracy, ddof=1) / math.sqrt(2):.2f} %"
    assert len(budgets(sections)) == 2 and "not equal" in " ".join(table.notes)
    page = report([tmp_path], html=tmp_path / "page.html", markdown=tmp_path / "tables.md").read_text()
    assert "Comparison of 2 searches" in page and "Search: ASHA over LoRA" in (tmp_path / "tables.md").read_text()
    assert len([path for path in (tmp_path / "tables-figures").iterdir() if path.stem.startswith("search-")]) == 10
    new_run(tmp_path / "elsewhere", "No backbone", method="none")  # a run of no search: the runs lead again
    assert "classified" in opening(page_of(tmp_path))[0]


@pytest.mark.parametrize(
    "options",
    [
        {"trials": 1, "fail": lambda number: 99}, {"trials": 3}, {"trials": 6, "fail": lambda number: 1},
        {"trials": 64, "stop_after": 37}, {"trials": 64, "stop_after": 0}, {"trials": 20, "rungs": 1, "most": 12},
        {"trials": 12, "rungs": 7, "most": 128, "loss": True},
    ],
    ids=["one", "three", "all failed", "running", "just begun", "one rung", "seven rungs"],
)  # fmt: skip
def test_a_page_of_any_search(options: Record, tmp_path: Path) -> None:
    record = make_search(tmp_path / "s", **options)
    page = report([tmp_path / "s"], html=tmp_path / "page.html", markdown=tmp_path / "tables.md").read_text()
    over = len(record["trials"]) == record["trials_asked"]
    assert ("The search is not over" in page) is not over
    assert ("there is no winner" in page) is (record["winner"] is None)
    assert len(record["rungs"]) > 1 or not ("% less" in page or "of training saved" in page)
    assert ("Failed trials" in page) is any(t["state"] == "failed" for t in record["trials"])
    assert not re.search(r"\bnan\b", page.split("</style>")[1], re.IGNORECASE) and "{where}" not in page
    if len(record["trials"]) < 8:
        assert "search-importance" not in page


def test_the_drawing_holds_a_line_a_trial(searched: tuple[Path, Record]) -> None:
    folder, record = searched
    axes, _ = drawn(folder, "search-settings")
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(SPACE) + 1]
    assert len(lines) == 64 and sum(line.get_linestyle() == "--" for line in lines) == 4
    axes, _ = drawn(folder, "search-curves")
    assert {len(line.get_xdata()) for line in axes.lines} >= {7, 13, 25, 50}
    assert [len(line.get_xdata()) for line in axes.lines if line.get_color() == INK] == [50]
    last = f"{sum(t['state'] == 'complete' for t in record['trials'])} trained to the end"
    assert last in [text.get_text() for text in drawn(folder, "search-rungs")[0].texts]


def test_a_lone_failure_keeps_its_colour_in_the_small_file(tmp_path: Path) -> None:
    make_search(tmp_path, 64, fail=lambda trial: 1 if trial == 7 else 99)
    picture = drawn(tmp_path, "search-curves")[1]
    colours = Image.open(io.BytesIO(png(picture))).convert("RGB").getcolors(10**6)
    red = [int(RED[place : place + 2], 16) for place in (1, 3, 5)]
    assert min(np.abs(np.subtract(colour, red)).max() for _, colour in colours) <= 2


def test_names_of_axes_do_not_lie_on_one_another(tmp_path: Path) -> None:
    record = make_search(tmp_path, 8)
    record["space"] |= {f"tune.{name}": SPACE["tune.lora_rank"] for name in ("lora_alpha", "lora_dropout")}
    (tmp_path / "search.json").write_text(json.dumps(record))
    axes, _ = drawn(tmp_path, "search-settings")
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) == 8 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_rates_to_choose_from_and_losses_that_ran_away_leave_the_others_apart(tmp_path: Path) -> None:
    record = make_search(tmp_path, 32, loss=True)
    record["space"]["optim.lr"] = {"choices": [1e-5, 1e-4, 1e-3]}
    for trial in record["trials"]:
        trial["settings"]["optim.lr"] = 10.0 ** (trial["number"] % 3 - 5)
    record["trials"][0]["rungs"][0]["score"] = 900.0
    (tmp_path / "search.json").write_text(json.dumps(record))
    axes, picture = drawn(tmp_path, "search-rate")
    assert axes.get_xscale() == "log" and [label.get_text() for label in axes.get_xticklabels()] == ["1e-05", "0.0001", "0.001"]
    assert axes.get_ylim()[1] < 10 and "losses are cut off" in picture.title


def test_importance_finds_the_settings_that_matter(searched: tuple[Path, Record]) -> None:
    """The curves hang on the learning rate, a little on the batch, and on nothing else."""
    pytest.importorskip("optuna")
    found = importances(read_search(searched[0] / "search.json"))
    assert found[0][0] == "optim.lr" and dict(found).keys() == SPACE.keys()
    assert sum(share for _, share in found) == pytest.approx(1) and found[0][1] > 0.5


def test_without_optuna_the_page_says_what_is_left_out(
    searched: tuple[Path, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    page = report([searched[0]], html=tmp_path / "page.html").read_text()
    assert "it needs the package optuna" in page and "PED-ANOVA" not in page and page.count("<figure>") == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.pop("rungs"), "has no 'rungs'"),
        (lambda record: record["trials"][0].pop("settings"), "has no 'settings'"),
        (lambda record: record["trials"][0].update(state="lost"), "trial 0 is 'lost'"),
        (lambda record: record["trials"][0].update(rungs=7), "isn't the record of a search"),
        (lambda record: record.update(winner=99), "winner 99"),
        (lambda record: record.update(rungs=[7, 7]), "do not rise"),
        (lambda record: record.update(factor=0), "factor 0"),
        (lambda record: record.update(trials_asked=math.inf), "isn't the record of a search"),
        (lambda record: record["space"].update(lr={"low": 1.0}), "has no 'high'"),
        (lambda record: record["trials"].append(record["trials"][0]), "two trials of one number"),
    ],
)
def test_a_foreign_record_is_one_sentence(change: Callable[[Record], Any], said: str, tmp_path: Path) -> None:
    record = make_search(tmp_path, 4)
    change(record)
    (tmp_path / "search.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        open_study([tmp_path])
    assert said in str(error.value) and str(tmp_path / "search.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '"a search"', "null", ""])
def test_a_damaged_record_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(UserError, match=r"search\.json'? is"):
        open_study([tmp_path])


def test_a_name_from_outside_is_escaped(tmp_path: Path) -> None:
    record = make_search(tmp_path, 4, fail=lambda number: 1 if number == 1 else 99)
    record["title"] = record["row"] = "<script>alert(1)</script>"
    record["trials"][1]["reason"] = "<b>no</b> {where}"
    (tmp_path / "search.json").write_text(json.dumps(record))
    page = report([tmp_path], html=tmp_path / "page.html").read_text()
    assert "<script>" not in page and "<b>no" not in page
