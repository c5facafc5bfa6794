"""Rows against one reference: what is paired, which numbers come out, what is said where nothing can be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from crossalign import cli
from crossalign.core.errors import UserError
from crossalign.report import summary_table
from crossalign.report.blocks import Figures, Table
from crossalign.report.pages import study_page
from crossalign.report.render.markdown import markdown, write_markdown
from crossalign.report.render.terminal import terminal
from crossalign.report.words import difference_text
from crossalign.results.contrasts import Pair, pair_up
from crossalign.results.outcomes import HELD_OUT, Outcome, chosen_by, outcomes_of, stated
from crossalign.runs.evaluations import Answers
from crossalign.runs.records import open_study, read_run
from crossalign.stats import combine_mcnemar, holm, mcnemar, paired_bootstrap, seeds_needed
from crossalign.verbs.compare.compared import Compared, as_json
from crossalign.verbs.compare.job import compare

DOCUMENTS = 120
LABELS = {"arc": "ARC (Easy)", "copa": "COPA", "wiki": "WikiText"}
NewRun = Callable[..., Path]


def text_run(folder: Path, row: str, seed: int, loss: float = 4.0, **config: Any) -> Path:
    """A finished run of a language model."""
    folder.mkdir(parents=True)
    align = "none" if row == "Baseline" else "cka"
    settings = {"seed": seed, "row": row, "align": {"metric": align}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text("{}")
    result = {"verb": "pretrain", "row": row, "seed": seed, "align": align, "weights": "random", "backbone": "gpt2"}
    result |= {"data": "novels", "data_fingerprint": "f", "teacher": "package:eyes", "test": None}
    result |= {"scores": {"validation": {"loss": loss}}, "held_out": {HELD_OUT: 0.1 + 0.3 * (align != "none") + seed / 90}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def evaluate(folder: Path, gain: float, seed: int, order: np.ndarray | None = None, kept: int = DOCUMENTS) -> None:
    """The evaluation of a run that is better by ``gain``: two tasks of right and wrong answers, and one of text."""
    draw, shared = np.random.default_rng([seed, round(1000 * gain)]), np.random.default_rng(1)
    ids = np.array([f"doc-{i}" for i in range(DOCUMENTS)])
    order = np.arange(DOCUMENTS) if order is None else order
    tasks, columns = {}, {}
    for name in ("arc", "copa"):
        hard = shared.random(DOCUMENTS)
        right = (hard + draw.normal(0, 0.15, DOCUMENTS) < 0.4 + gain).astype(float)
        columns[name] = {"acc": right}
        tasks[name] = {"metrics": {"acc": right[order[:kept]].mean()}}
    size = shared.integers(50, 900, DOCUMENTS).astype(float)
    bits = size * (2.0 - gain + draw.normal(0, 0.05, DOCUMENTS))
    columns["wiki"] = {"loglikelihood": -bits * math.log(2), "words": np.round(size / 5), "bytes": size}
    chosen = order[:kept]
    rate = bits[chosen].sum() / size[chosen].sum()
    tasks["wiki"] = {"metrics": {"bits_per_byte": rate, "word_perplexity": 2 ** (5 * rate)}}
    samples = folder / "evaluation" / "samples"
    samples.mkdir(parents=True)
    for name, told in tasks.items():
        told |= {"label": LABELS[name], "n": kept, "stderr": {}}
        table = {"doc_id": ids[chosen], **{key: values[chosen] for key, values in columns[name].items()}}
        pq.write_table(pa.table(table), samples / f"{name}.parquet")
    (folder / "evaluation" / "results.json").write_text(json.dumps({"tasks": tasks}))


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """Three rows of a language model over four seeds, with three tasks; the documents of each run in an order of its own."""
    for place, (row, gain) in enumerate((("Baseline", 0.0), ("DINO", 0.05), ("CLIP", 0.2))):
        for seed in range(4):
            loss = 4.0 - gain + 0.01 * (seed + place * seed**2 % 3)
            folder = text_run(tmp_path / "study" / row / f"seed-{seed}", row, seed, loss)
            evaluate(folder, gain, seed, np.random.default_rng([seed, place]).permutation(DOCUMENTS))
    return tmp_path / "study"


def column(folder: Path, task: str, name: str) -> np.ndarray:
    """A column of a samples file in the order of its documents' ids."""
    table = pq.read_table(folder / "evaluation" / "samples" / f"{task}.parquet")
    return np.asarray(table.column(name))[np.argsort(np.asarray(table.column("doc_id")))]


def one_of(found: Compared, row: str, outcome: str) -> Any:
    return next(one for one in found.contrasts.itertuples() if (one.other, one.outcome) == (row, outcome))


def test_over_seeds_it_is_scipys_paired_t_test_with_holm_over_tasks_and_rows(evaluated: Path) -> None:
    found = compare([evaluated], resamples=200)
    tasks = [one for one in found.contrasts.itertuples() if one.family == "tasks"]
    assert [(one.outcome, one.other) for one in tasks] == [
        (task, row) for task in ("arc.acc", "copa.acc", "wiki.bits_per_byte") for row in ("CLIP", "DINO")
    ]
    p_values = []
    for one in tasks:
        values = {
            row: [
                json.loads((evaluated / row / f"seed-{seed}" / "evaluation" / "results.json").read_text())["tasks"][
                    one.outcome.split(".")[0]
                ]["metrics"][one.outcome.split(".")[1]]
                for seed in range(4)
            ]
            for row in ("Baseline", one.other)
        }
        expected = stats.ttest_rel(values[one.other], values["Baseline"])
        assert one.t is not None
        assert one.p_seeds == pytest.approx(expected.pvalue)
        assert one.t.interval == pytest.approx(tuple(expected.confidence_interval()))
        assert one.needed == seeds_needed(one.t.difference, one.t.sd)
        assert one.needed_corrected == seeds_needed(one.t.difference, one.t.sd, alpha=0.05 / 6)
        p_values.append(expected.pvalue)
    assert [one.p_seeds_holm for one in tasks] == pytest.approx(holm(p_values))
    losses = [one for one in found.contrasts.itertuples() if one.family == "losses"]
    assert [one.p_seeds_holm for one in losses] == pytest.approx(holm([one.p_seeds for one in losses]))


def test_over_documents_they_are_paired_by_id_whatever_their_order(evaluated: Path) -> None:
    found = compare([evaluated], resamples=300)
    one = one_of(found, "CLIP", "arc.acc")
    right = {row: [column(evaluated / row / f"seed-{s}", "arc", "acc") for s in range(4)] for row in ("Baseline", "CLIP")}
    tests = [mcnemar(a == 1, b == 1) for a, b in zip(right["Baseline"], right["CLIP"], strict=True)]
    assert one.mcnemar == tuple(tests)
    assert one.p_mcnemar == pytest.approx(combine_mcnemar(tests))
    difference = np.mean(right["CLIP"], axis=0) - np.mean(right["Baseline"], axis=0)
    assert one.bootstrap == paired_bootstrap(difference, resamples=300)


def test_bits_per_byte_resample_documents_with_their_bytes(evaluated: Path) -> None:
    one = one_of(compare([evaluated], resamples=300), "DINO", "wiki.bits_per_byte")
    bits = {
        row: np.mean([-column(evaluated / row / f"seed-{s}", "wiki", "loglikelihood") for s in range(4)], axis=0) / math.log(2)
        for row in ("Baseline", "DINO")
    }
    size = column(evaluated / "DINO" / "seed-0", "wiki", "bytes")
    expected = paired_bootstrap(bits["DINO"] - bits["Baseline"], size, resamples=300)
    assert one.bootstrap is not None and one.bootstrap.interval == pytest.approx(expected.interval)
    assert one.bootstrap.p_value == expected.p_value and one.mcnemar is None
    assert one.t is not None and one.t.difference == pytest.approx(one.bootstrap.difference)


def test_table_3_has_means_errors_and_stars_after_correction_only(evaluated: Path) -> None:
    found = compare([evaluated], tasks=("arc.*", "wiki.*"), resamples=200)
    means = found.tables[0]
    assert means.columns == ["Row", "ARC (Easy) acc (%) ↑", "WikiText bits_per_byte ↓", "WikiText word_perplexity ↓", "Seeds"]
    assert [row[0] for row in means.rows] == ["Baseline", "CLIP", "DINO"]
    accuracy = [column(evaluated / "Baseline" / f"seed-{s}", "arc", "acc").mean() for s in range(4)]
    assert means.rows[0][1] == f"{100 * np.mean(accuracy):.2f} ± {100 * stats.sem(accuracy):.2f}"
    assert "wiki.word_perplexity" not in set(found.contrasts.outcome)
    assert "in other units" in means.notes[1]
    for row in means.rows[1:]:
        p = one_of(found, row[0], "arc.acc").p_seeds_holm
        assert p is not None
        assert row[1].count("*") == sum(p <= level for level in (0.05, 0.01, 0.001))
    assert "***" in means.rows[1][1] or "**" in means.rows[1][1]


def test_no_star_without_the_correction(tmp_path: Path) -> None:
    """A row whose p is under 0.05 alone and above it among others."""
    losses = {"Baseline": [4.0, 4.1, 4.2, 4.3], "A": [3.96, 4.05, 4.13, 4.27]}
    losses |= {name: [4.05, 4.02, 4.25, 4.2 + 0.1 * i] for i, name in enumerate("BCDEFGHIJ")}
    for row, values in losses.items():
        for seed, loss in enumerate(values):
            text_run(tmp_path / row / f"seed-{seed}", row, seed, loss)
    found = compare([tmp_path], tasks=("loss.*",))
    one = one_of(found, "A", "loss.validation")
    assert one.p_seeds is not None and one.p_seeds_holm is not None and one.p_seeds < 0.05 < one.p_seeds_holm
    assert "*" not in str(found.tables[0].rows)
    assert "a hint at a difference, lost on correction" in found.sentences[0]
    alone = compare([tmp_path / "Baseline", tmp_path / "A"], tasks=("loss.*",))
    assert "*" in alone.tables[0].rows[1][1] and "shown to be better" in alone.sentences[0]


def test_table_1_has_the_difference_with_its_error(study_folder: Path) -> None:
    found = compare([study_folder], resamples=200)
    means = found.tables[0]
    assert means.columns == ["Row", "test accuracy (%) ↑", "Δ from FPT", "Seeds"] and len(means.rows) == 14
    assert means.rows[0][0] == "FPT" and means.rows[0][2] == "–"
    for row in means.rows[1:]:
        one = one_of(found, row[0], "accuracy")
        assert one.t is not None and one.t.error is not None
        assert row[2].endswith(f" ± {100 * one.t.error:.2f}")
    assert any("stopped" in note and "not finished" in note for note in found.notes)


def test_no_difference_is_ever_shown_without_its_uncertainty(tmp_path: Path, new_run: NewRun, evaluated: Path) -> None:
    """One seed; with answers the ± is over documents, without them no difference stands anywhere."""
    new_run(tmp_path / "a"), new_run(tmp_path / "b", "LoRA", method="lora", skill=0.6)
    whole = compare([tmp_path / "a", tmp_path / "b"])
    assert whole.tables[0].rows[1][2].endswith("†") and "1 seed, over 500 images" in whole.sentences[0]
    assert "cannot be told from one seed" in whole.sentences[0]
    (tmp_path / "b" / "predictions.parquet").unlink()
    bare = compare([tmp_path / "a", tmp_path / "b"])
    assert bare.tables[0].rows[1][2] == "–" and "nothing is known of the chance of a difference (one seed" in bare.sentences[0]
    assert any("no predictions.parquet" in note for note in bare.notes)
    assert as_json(bare)["comparisons"][0]["t"]["difference"] is None
    for found in (whole, bare, compare([evaluated]), compare([evaluated], by="sample")):
        for line in terminal(found.page).splitlines():
            for sign in ("+", "−"):
                if f" {sign}" in line and not line.startswith("reference"):
                    assert "±" in line, line


def test_seeds_that_differ_by_the_same_amount_state_nothing(tmp_path: Path) -> None:
    for seed, loss in enumerate((4.0, 4.5, 5.0)):
        text_run(tmp_path / "a" / f"{seed}", "Baseline", seed, loss)
        text_run(tmp_path / "b" / f"{seed}", "CLIP", seed, loss + 0.25)
    found = compare([tmp_path], tasks=("loss.*",))
    assert "nothing is known of the chance of a difference (all seeds differ by the same amount" in found.sentences[0]
    assert "same amount" in found.tables[1].rows[0][2] and "0.25" not in terminal(found.page)


def test_a_family_is_said_to_be_of_what_was_tested(evaluated: Path) -> None:
    for seed in range(4):
        shutil.rmtree(evaluated / "DINO" / f"seed-{seed}" / "evaluation")
    compared = compare([evaluated], tasks=("arc.acc", "copa.acc"), resamples=200)
    contrasts = list(compared.contrasts.itertuples())
    assert sum(bool(contrast.reason) for contrast in contrasts) == 2 and len(contrasts) == 4
    assert [c.p_seeds_holm for c in contrasts] == holm([c.p_seeds for c in contrasts])
    assert any("over all 2 comparisons" in note for note in compared.tables[1].notes)


def test_documents_that_one_run_lacks_are_left_out_and_told(tmp_path: Path) -> None:
    for row, gain, kept in (("Baseline", 0.0, DOCUMENTS), ("CLIP", 0.1, 100)):
        for seed in range(3):
            folder = text_run(tmp_path / row / f"{seed}", row, seed)
            evaluate(folder, gain, seed, kept=kept)
    found = compare([tmp_path], tasks=("arc.acc",), resamples=200)
    one = next(found.contrasts.itertuples())
    assert one.bootstrap is not None and one.bootstrap.n == 100
    firsts = [column_first(tmp_path / "Baseline" / str(seed), 100) for seed in range(3)]
    assert one.reference_values == pytest.approx([values.mean() for values in firsts])  # the t-test too is on these
    assert any("20 of 120 documents are not in all" in note for note in found.notes)


def column_first(folder: Path, count: int) -> np.ndarray:
    return np.asarray(pq.read_table(folder / "evaluation" / "samples" / "arc.parquet").column("acc"))[:count]


def rewrite(folder: Path, task: str, change: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> None:
    path = folder / "evaluation" / "samples" / f"{task}.parquet"
    pq.write_table(pa.table(change(pq.read_table(path).to_pydict())), path)


def test_other_documents_other_seeds_and_other_data_are_not_paired(tmp_path: Path, new_run: NewRun) -> None:
    a, b = (text_run(tmp_path / row, row, 0) for row in ("Baseline", "CLIP"))
    c = text_run(tmp_path / "later", "DINO", 7)
    for folder in (a, b, c):
        evaluate(folder, 0.1, 0)
    rewrite(b, "arc", lambda t: t | {"doc_id": [f"other {i}" for i in t["doc_id"]]})
    rewrite(b, "wiki", lambda t: t | {"bytes": t["bytes"][::-1]})
    found = compare([a, b, c], resamples=200)
    assert one_of(found, "CLIP", "arc.acc").reason == "no document in common"
    assert one_of(found, "CLIP", "wiki.bits_per_byte").reason == "different documents under the same ids"
    assert one_of(found, "DINO", "arc.acc").reason == "different seeds: 7 here, 0 there"
    assert "not compared, no document in common" in "".join(found.sentences)
    result = json.loads((b / "result.json").read_text())
    (b / "result.json").write_text(json.dumps(result | {"data_fingerprint": "g"}))
    assert "different data" in one_of(compare([a, b]), "CLIP", "loss.validation").reason
    (b / "result.json").write_text(json.dumps(result | {"teacher": "package:other"}))
    assert "another vision model" in one_of(compare([a, b]), "CLIP", "alignment").reason
    (b / "result.json").write_text(json.dumps(result | {"teacher": "random:package:eyes"}))
    assert one_of(compare([a, b]), "CLIP", "alignment").reason == ""  # measured by the trained original
    new_run(tmp_path / "x"), new_run(tmp_path / "y", "LoRA", images=400)
    assert compare([tmp_path / "x", tmp_path / "y"]).contrasts.reason[0] == "different test images"


def test_rows_are_apart_by_every_setting_but_the_seed(tmp_path: Path, new_run: NewRun) -> None:
    for seed in (0, 1):
        new_run(tmp_path / f"a{seed}", seed=seed)
        new_run(tmp_path / f"b{seed}", seed=seed, config={"optim": {"lr": 0.01}})
    found = compare([tmp_path / "b0", tmp_path / "b1", tmp_path / "a0", tmp_path / "a1"], resamples=200)
    assert found.rows == ["FPT, optim.lr 0.01", "FPT, optim.lr 0.001"]  # the first given first
    assert [found.results.row[label].seeds for label in found.rows] == [(0, 1), (0, 1)]


def test_the_reference_can_be_named_or_pointed_at(evaluated: Path) -> None:
    assert compare([evaluated], resamples=200).rows[0] == "Baseline"
    assert compare([evaluated], reference="DINO", resamples=200).rows[0] == "DINO"
    assert compare([evaluated], reference=str(evaluated / "CLIP" / "seed-1"), resamples=200).rows[0] == "CLIP"
    assert compare([evaluated / "DINO", evaluated], resamples=200).rows[0] == "DINO"
    with pytest.raises(UserError, match="unknown row 'DIMO'; did you mean 'DINO'"):
        compare([evaluated], reference="DIMO")
    with pytest.raises(UserError, match="several rows"):
        compare([evaluated], reference=str(evaluated))


def test_stars_by_sample_are_of_the_tests_over_documents(evaluated: Path) -> None:
    found = compare([evaluated], by="sample", tasks=("arc.acc", "wiki.bits_per_byte"), resamples=2000)
    over_seeds = compare([evaluated], tasks=("arc.acc", "wiki.bits_per_byte"), resamples=2000)
    one, seeds = (one_of(each, "CLIP", "wiki.bits_per_byte") for each in (found, over_seeds))
    assert (one.over, one.p, one.p_holm) == ("items", one.p_bootstrap, one.p_bootstrap_holm)
    assert (seeds.over, seeds.p, seeds.p_holm) == ("seeds", one.p_seeds, one.p_seeds_holm)
    assert one_of(found, "CLIP", "arc.acc").p == one_of(found, "CLIP", "arc.acc").p_mcnemar
    assert "4 seeds, over 120 documents" in found.sentences[2] and "over documents." in found.tables[0].notes[-1]


def test_bad_input_is_one_sentence(tmp_path: Path, new_run: NewRun, evaluated: Path) -> None:
    def told(*paths: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            compare(list(paths), **options)
        return str(caught.value)

    new_run(tmp_path / "one"), new_run(tmp_path / "two", seed=1), (tmp_path / "empty").mkdir()
    new_run(tmp_path / "stopped", "LoRA", complete=False)
    assert "'FPT' (seeds 0, 1) is the only row" in told(tmp_path / "one", tmp_path / "two", tmp_path / "stopped")
    assert "no run in" in told(tmp_path / "empty") and "no run folder at" in told(tmp_path / "nowhere")
    assert "1 run not finished" in told(tmp_path / "stopped")
    assert "image classifiers and of language models" in told(tmp_path / "one", evaluated)
    assert "unknown task 'arc'; did you mean 'arc.acc'" in told(evaluated, tasks=("arc",))
    assert "name that one as well" in told(evaluated, tasks=("wiki.word_perplexity",))
    assert "100 resamples are too few" in told(evaluated, resamples=100)
    run = evaluated / "CLIP" / "seed-2"
    for change, says in (
        (lambda t: {"acc": t["acc"]}, "has no column 'doc_id' (columns: acc)"),
        (lambda t: t | {"doc_id": ["x"] * DOCUMENTS}, "holds a doc_id twice"),
        (
            lambda t: t | {"doc_id": [f"{i}" for i in range(DOCUMENTS)], "acc": [None] * 3 + t["acc"][3:]},
            "no number for 3 documents",
        ),
        (lambda t: t | {"acc": ["right"] * DOCUMENTS}, "has other values than numbers in its columns acc"),
    ):
        rewrite(run, "arc", change)
        notes = compare([evaluated], resamples=200).notes
        assert any(says in note and "evaluate" in note and "\n" not in note for note in notes)
    (run / "evaluation" / "samples" / "arc.parquet").write_text("no parquet")
    assert any("cannot be read" in note for note in compare([evaluated], resamples=200).notes)
    (run / "evaluation" / "results.json").write_text('{"tasks": 3}')
    notes = compare([evaluated], resamples=200).notes
    assert any(note.startswith("Left out: ") and "is damaged or has no tasks" in note for note in notes)


def test_runs_without_samples_or_evaluation_say_what_to_run(evaluated: Path) -> None:
    run = evaluated / "CLIP" / "seed-2"
    (run / "evaluation" / "samples" / "arc.parquet").unlink()
    found = compare([evaluated], resamples=200)
    assert one_of(found, "CLIP", "arc.acc").bootstrap is None and one_of(found, "CLIP", "arc.acc").p_seeds is not None
    assert any(f"crossalign evaluate {run}" in note for note in found.notes)
    (run / "evaluation" / "results.json").unlink()
    found = compare([evaluated], resamples=200)
    assert one_of(found, "CLIP", "copa.acc").seeds == (0, 1, 3)
    assert any("seed 2 of “CLIP” is left out" in note and "crossalign evaluate" in note for note in found.notes)


def test_documents_that_do_not_come_to_the_score_are_not_compared(evaluated: Path) -> None:
    path = evaluated / "CLIP" / "seed-2" / "evaluation" / "results.json"
    told = json.loads(path.read_text())
    told["tasks"]["copa"]["metrics"]["acc"] += 0.05
    path.write_text(json.dumps(told))
    rewrite(evaluated / "DINO" / "seed-1", "arc", lambda t: {k: v for k, v in t.items() if k != "acc"})
    found = compare([evaluated], resamples=200)
    for row, outcome, says in (
        ("CLIP", "copa.acc", "copa.parquet does not come to the acc of results.json"),
        ("DINO", "arc.acc", "arc.parquet has no column 'acc' to pair documents by (columns: doc_id)"),
    ):
        assert one_of(found, row, outcome).bootstrap is None and one_of(found, row, outcome).p_seeds is not None
        assert any(says in note for note in found.notes)


def test_tasks_that_were_not_asked_alike_are_not_paired(evaluated: Path) -> None:
    for row, change in (("CLIP", {"few_shot": 5}), ("DINO", {"label": "ARC (Easy), dev"})):
        for seed in range(4):
            path = evaluated / row / f"seed-{seed}" / "evaluation" / "results.json"
            told = json.loads(path.read_text())
            told["tasks"]["arc"] |= change
            told["tasks"]["wiki"] |= {"max_length": 64} if row == "DINO" else {"bos": True}
            path.write_text(json.dumps(told))
    found = compare([evaluated], resamples=200)
    assert one_of(found, "CLIP", "arc.acc").reason == "different few-shot: 5 here, None there"
    assert "ARC (Easy), dev here, ARC (Easy) there" in one_of(found, "DINO", "arc.acc").reason
    assert "pieces of 64 tokens" in one_of(found, "DINO", "wiki.bits_per_byte").reason
    assert one_of(found, "CLIP", "wiki.bits_per_byte").reason == "different bos: True here, None there"
    assert one_of(found, "DINO", "copa.acc").reason == ""


def test_results_say_which_way_is_better(evaluated: Path) -> None:
    for path in evaluated.rglob("results.json"):
        told = json.loads(path.read_text())
        told["tasks"]["copa"]["higher_is_better"] = {"acc": False}
        path.write_text(json.dumps(told))
    found = compare([evaluated], resamples=200)
    assert found.tables[0].columns[1:3] == ["ARC (Easy) acc (%) ↑", "COPA acc (%) ↓"]


def test_answers_are_put_in_the_order_asked_for() -> None:
    held = Answers(np.array(["b", "a", "c"]), np.array([2.0, 1.0, 3.0]), np.array([20.0, 10.0, 30.0]))
    assert held.only(np.array(["c", "a"])).amount.tolist() == [3.0, 1.0] and held.score == 0.1
    right = Answers(np.arange(4), np.array([1.0, 0, 0, 1]), np.ones(4))
    assert right.right_or_wrong and not held.right_or_wrong
    assert right.error == pytest.approx(stats.sem(right.amount))


def test_markdown_json_and_terminal_say_the_same(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    call = ["compare", str(evaluated), "--by", "seed", "--tasks", "arc.acc", "copa.acc", "--resamples", "300"]
    assert cli.main([*call, "--markdown", str(page), "--json", str(numbers)]) == 0
    shown, written = capsys.readouterr().out, json.loads(numbers.read_text())
    for one in written["comparisons"]:
        assert one["sentence"] in shown and "seeds would be needed to see a difference of that size" in one["sentence"]
    assert written["reference"] == "Baseline" and len(written["comparisons"]) == 4
    text = page.read_text()
    assert text.startswith("# Comparison with “Baseline”") and text.count("| Baseline |") == 1
    again = tmp_path / "again.md"
    write_markdown(compare([evaluated], tasks=("arc.acc", "copa.acc"), resamples=300).page, again)
    assert again.read_text() == text  # nothing of it is left to chance


def test_pairing_takes_the_documents_of_all_seeds(evaluated: Path) -> None:
    run = evaluated / "DINO" / "seed-3"
    rewrite(run, "copa", lambda t: {key: values[:70] for key, values in t.items()})
    told = json.loads((run / "evaluation" / "results.json").read_text())
    told["tasks"]["copa"]["metrics"]["acc"] = column(run, "copa", "acc").mean()
    (run / "evaluation" / "results.json").write_text(json.dumps(told))
    found = compare([evaluated], resamples=200)
    pairing = pair_up(found.results, Pair("beside", "copa.acc", found.rows[0], "DINO", "tasks"))
    assert {len(a.ids) for a, _ in pairing.answers} == {70} and all(np.array_equal(a.ids, b.ids) for a, b in pairing.answers)


def test_outcomes_that_a_run_states_are_taken_as_they_stand(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for row in ("Baseline", "CLIP"):
        for seed in range(3):
            folder = text_run(tmp_path / row / f"{seed}", row, seed)
            amount = draw.random(50) + (row == "CLIP")
            pq.write_table(pa.table({"id": [f"{i}" for i in range(50)], "amount": amount}), folder / "auroc.parquet")
            stated = {
                "name": "auroc",
                "label": "AUROC",
                "family": "areas",
                "value": amount.mean(),
                "digits": 3,
                "items": "lesions",
            }
            stated |= {"fingerprint": [["other lesions: {here} here, {there} there", "a"]], "answers": "auroc.parquet"}
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps(result | {"outcomes": [stated, {"name": "bare", "value": 1.0}]}))
    found = compare([tmp_path], resamples=200)
    assert found.results.outcomes.outcome.tolist() == ["auroc", "bare"]  # not the losses that are there as well
    one = one_of(found, "CLIP", "auroc")
    assert one.t.n == 3 and one.bootstrap.n == 50 and one.verdict == "gain" and "Over lesions" in found.tables[2].title
    path = tmp_path / "CLIP" / "0" / "result.json"
    path.write_text(path.read_text().replace('"a"', '"b"'))
    assert "left out: other lesions: b here, a there" in " ".join(compare([tmp_path], resamples=200).notes)
    path.write_text(path.read_text().replace('"name": "bare"', '"label": "bare"'))
    assert "has a damaged outcome ('name')" in " ".join(compare([tmp_path], resamples=200).notes)


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        (5, "no list of outcomes"),
        (["accuracy"], "no list of outcomes"),
        ([{"name": 7}], "label is 7|name is 7"),
        ([{"name": "a", "digits": "two"}], "digits is 'two'"),
        ([{"name": "a", "share": 1}], "share is 1"),
        ([{"name": "a", "colour": "red"}], "colour"),
        ([{"name": "a", "fingerprint": 3}], "damaged outcome"),
        ([{"name": "a", "answers": 3}], "file is 3"),
        ([{"name": "a", "answers": {"amount": "x"}}], "file"),
        ([{"name": "a", "answers": {"file": "x", "amount": []}}], r"amount is \[\]"),
        ([{"name": "a", "answers": {"file": "x", "amount": ["b", "c", "d"]}}], "amount is"),
        ([{"name": "a", "answers": {"file": "x", "amount": [1]}}], "amount is"),
        ([{"name": "a", "answers": "../seed-1/predictions.parquet"}], "no file of the run's folder"),
    ],
)
def test_outcomes_that_are_damaged_are_refused(tmp_path: Path, new_run: NewRun, outcomes: Any, says: str) -> None:
    for seed in range(2):
        folder = new_run(tmp_path / "FPT" / f"seed-{seed}", seed=seed)
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | {"outcomes": outcomes}))
    with pytest.raises(UserError, match=f"result.json has .*({says})"):
        compare([tmp_path], resamples=200)


def test_a_run_without_a_validation_outcome_is_chosen_by_none(tmp_path: Path, new_run: NewRun) -> None:
    folder = new_run(tmp_path / "FPT")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"outcomes": [{"name": "auroc", "value": 0.8}]}))
    with pytest.raises(UserError, match=r"result\.json states no outcome of the family 'validation'"):
        chosen_by(read_run(folder))


@pytest.mark.parametrize(
    ("ids", "amounts", "sizes", "says"),
    [
        ([0, 1, 1], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], "an item twice"),
        ([None, 1, 2], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], "items without a number or a name"),
        ([0, 1, 2], [1.0, float("nan"), 1.0], [1.0, 1.0, 1.0], "other values than numbers"),
        ([0, 1, 2], ["yes", "no", "yes"], [1.0, 1.0, 1.0], "other values than numbers"),
        ([0, 1, 2], [1.0, 0.0, 1.0], [1.0, float("inf"), 1.0], "other values than numbers"),
        ([0, 1, 2], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0], "no items of any size"),
    ],
)
def test_answers_that_cannot_be_paired_leave_the_test_over_seeds(
    tmp_path: Path, ids: list[Any], amounts: list[Any], sizes: list[Any], says: str
) -> None:
    for row, gain in (("Baseline", 0.0), ("CLIP", 1.0)):
        for seed, luck in enumerate((0.0, 0.1, 0.3)):
            folder = text_run(tmp_path / row / f"{seed}", row, seed)
            pq.write_table(pa.table({"id": ids, "amount": amounts, "size": sizes}), folder / "areas.parquet")
            result = json.loads((folder / "result.json").read_text())
            entry = {"name": "area", "value": 0.5 + luck + gain * (1 + luck), "answers": "areas.parquet"}
            (folder / "result.json").write_text(json.dumps(result | {"outcomes": [entry]}))
    compared = compare([tmp_path], resamples=200)
    contrast = one_of(compared, "CLIP", "area")
    assert contrast.verdict == "gain" and contrast.over == "seeds" and contrast.bootstrap is None
    assert sum(f"areas.parquet has {says}, so its documents are not paired" in note for note in compared.notes) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None, "0.5"])
def test_a_number_that_is_none_is_no_number(tmp_path: Path, value: Any) -> None:
    for row in ("Baseline", "CLIP"):
        for seed in range(2):
            folder = text_run(tmp_path / row / f"{seed}", row, seed)
            result = json.loads((folder / "result.json").read_text())
            bare = {"name": "area", "value": value if row == "CLIP" else 0.5}
            (folder / "result.json").write_text(json.dumps(result | {"outcomes": [bare]}))
    contrast = one_of(compare([tmp_path], resamples=200), "CLIP", "area")
    assert (contrast.verdict, contrast.reason) == ("unpaired", "no area")


def test_one_seed_of_several_has_its_error_over_documents(evaluated: Path) -> None:
    for row in ("Baseline", "CLIP"):
        for seed in (0, 2, 3):
            shutil.rmtree(evaluated / row / f"seed-{seed}" / "evaluation")
    (cell,) = {line[1] for line in compare([evaluated], tasks=("arc.acc",), resamples=200).tables[0].rows if line[0] == "CLIP"}
    assert cell.rstrip("*").endswith("†")


def test_frames_are_tidy(evaluated: Path) -> None:
    results = compare([evaluated], resamples=200).results
    values = results.values
    assert len(values) == 12 * (4 + 2) and set(values.columns) == {"run", "row", "seed", "outcome", "value", "fingerprint"}
    arc = values[(values.row == "CLIP") & (values.outcome == "arc.acc")]
    assert arc.seed.tolist() == [0, 1, 2, 3] and results.mean("CLIP", "arc.acc").mean == pytest.approx(arc.value.mean())
    assert results.rows.row.tolist() == list(results.row) and results.rows.verb.unique().tolist() == ["pretrain"]
    assert results.outcomes.set_index("outcome").lower_is_better.to_dict()["wiki.bits_per_byte"]
    assert results.curves.empty


def page_of(folder: Path) -> str:
    """The report of the runs."""
    return markdown(study_page(open_study([folder])))


@pytest.mark.parametrize("kind", ["classifiers", "texts"])
def test_stated_outcomes_are_those_of_a_record_that_states_none(tmp_path: Path, new_run: NewRun, kind: str) -> None:
    for seed in range(3):
        for row, skill in (("FPT", 0.4), ("LoRA", 0.5)):
            if kind == "classifiers":
                new_run(tmp_path / row / f"seed-{seed}", row, method=row.lower(), seed=seed, skill=skill, images=200)
            else:
                text_run(tmp_path / row / f"seed-{seed}", "Baseline" if row == "FPT" else row, seed, 4.0 - skill + seed / 100)
    before, page = compare([tmp_path], resamples=200), page_of(tmp_path)
    for run in open_study([tmp_path]).runs:
        whole = {**(run.result or {}), "outcomes": outcomes_of(run)}
        (run.folder / "result.json").write_text(json.dumps(whole))
    after = compare([tmp_path], resamples=200)
    assert json.loads((tmp_path / "FPT" / "seed-0" / "result.json").read_text())["outcomes"]
    pandas.testing.assert_frame_equal(after.results.values, before.results.values)
    pandas.testing.assert_frame_equal(after.results.outcomes, before.results.outcomes)
    assert as_json(after) == as_json(before) and page_of(tmp_path) == page


@pytest.mark.parametrize("verb", ["adapt", "segment"])
def test_an_outcome_of_a_new_name_goes_the_whole_way(tmp_path: Path, new_run: NewRun, verb: str) -> None:
    """A run states it, with a file of its own: it is in tables, figures and comparisons, beside others or alone."""
    area = Outcome("auroc", "area under the curve", "areas", digits=3, items="lesions")
    answers = {"file": "lesions.parquet", "id": "lesion", "amount": ["true", "said"]}
    for row, skill in (("FPT", 0.3), ("LoRA", 0.9)):
        for seed in range(3):
            folder = new_run(tmp_path / row / f"seed-{seed}", row, method=row.lower(), seed=seed, images=50)
            true = np.arange(80) % 2
            said = np.where(np.random.default_rng(seed).random(80) < skill, true, 1 - true)
            pq.write_table(pa.table({"lesion": np.arange(80), "true": true, "said": said}), folder / answers["file"])
            entry = stated(area, float((true == said).mean()), (("other lesions", "a"),), answers)
            run = read_run(folder)
            result = {**(run.result or {}), "verb": verb, "outcomes": [*(outcomes_of(run) if verb == "adapt" else []), entry]}
            if verb != "adapt":
                del result["test"], result["validation"]
            (folder / "result.json").write_text(json.dumps(result))
    found = compare([tmp_path], reference="FPT", resamples=200)
    one = one_of(found, "LoRA", "auroc")
    assert one.t.n == 3 and one.bootstrap.n == 80 and one.verdict == "gain" and len(one.mcnemar) == 3
    assert found.results.outcomes.outcome.tolist() == ["accuracy"] * (verb == "adapt") + ["auroc"]
    page = study_page(open_study([tmp_path]))
    told = markdown(page)
    tables = [block for block in page.of("markdown") if isinstance(block, Table)]
    (means,) = [table for table in tables if "area under the curve ↑" in table.columns]
    baseline, other = (dict(zip(means.columns, line, strict=True)) for line in means.rows)
    assert baseline["Δ from FPT"] == "–" and other["Δ from FPT"] == difference_text(area, one.difference, one.error)
    assert other["area under the curve ↑"].endswith("*") and any(note.startswith("* p ≤ 0.05") for note in means.notes)
    assert other["Δ from FPT"] in summary_table([tmp_path])
    assert "area under the curve ↑" in told and "Over seeds: the methods, area under the curve" in told
    drawn = [block.figures for block in page.of("markdown") if isinstance(block, Figures)]
    assert any(figure.name == "differences-further" for figures in drawn for figure in figures)
    assert "area under the curve" in summary_table([tmp_path])
