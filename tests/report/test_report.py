"""The page, the Markdown file and the terminal table: right numbers, nothing from outside, nothing unescaped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from crossalign.core.errors import UserError
from crossalign.report import report, summary_table
from crossalign.report.contrasts import question_tables
from crossalign.report.figures.drawing import styled
from crossalign.report.figures.shared import difference_figure
from crossalign.report.pages import study_page
from crossalign.report.render.markdown import markdown
from crossalign.report.render.terminal import as_text
from crossalign.report.tables import accuracy_table, sweep_table
from crossalign.report.words import findings, p_text, points, sentence
from crossalign.results.contrasts import contrasts
from crossalign.results.frame import Results
from crossalign.results.questions import image_pairs
from crossalign.runs.records import open_study

Maker = Callable[..., Path]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def written(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    report([study_folder], folder / "page.html", folder / "page.md", figures=True)
    return folder


@pytest.fixture(scope="module")
def many(written: Path) -> Page:
    return Page((written / "page.html").read_text(encoding="utf-8"))


def asked(folder: Path) -> tuple[Results, Any]:
    """The numbers of runs, and the frame of what the report asks of them."""
    results = Results(open_study([folder]))
    return results, contrasts(results, image_pairs(results))


def told_of_one(folder: Path) -> str:
    """What is said of the one contrast of some runs."""
    results, frame = asked(folder)
    (one,) = frame.itertuples()
    return sentence(results, one)


def three_seeds(folder: Path, new_run: Maker, plain: list[int], aligned: list[int]) -> Path:
    for seed, (a, b) in enumerate(zip(plain, aligned, strict=True)):
        images = np.arange(1000)
        new_run(folder / f"a{seed}", correct=images < a, images=1000, seed=seed)
        new_run(folder / f"b{seed}", "FPT + MMD", align="mmd", correct=images < b, images=1000, seed=seed)
    return folder


def test_the_results_table_has_the_numbers_that_went_in(tmp_path: Path, new_run: Maker) -> None:
    table = accuracy_table(Results(open_study([three_seeds(tmp_path, new_run, [400, 420, 410], [430, 440, 420])])))
    # 40, 42, 41: mean 41, SD 1, standard error 1 / √3; differences 3, 2, 1
    assert table.rows[0] == ["FPT", "41.00 ± 0.58", "–", "1.250 ± 0.000", "4.00", "42.00", "0.001", "3"]
    assert table.rows[1][:3] == ["FPT + MMD", "43.00 ± 0.58", "+2.00 ± 0.58"]
    assert table.strong == {1}


def test_one_seed_never_shows_a_difference_without_uncertainty(tmp_path: Path, new_run: Maker) -> None:
    images = np.arange(400)
    new_run(tmp_path / "a", correct=images < 200, images=400)
    new_run(tmp_path / "b", "FPT + MMD", align="mmd", correct=images < 204, images=400)
    table = accuracy_table(Results(open_study([tmp_path])))
    assert table.rows[0][1] == "50.00 ± 2.50†"
    assert table.rows[1][2].startswith("+1.00 ± 0.") and table.rows[1][2].endswith("†")
    assert any("One seed" in note for note in table.notes)
    told = told_of_one(tmp_path)
    assert "points (1 seed, over 400 images, p = " in told and "no difference could be shown" in told
    notes = " ".join(question_tables(*asked(tmp_path))[-1].notes)
    assert "over test images and says nothing of other seeds" in notes and "Bold" in notes and "without ±" not in notes
    (tmp_path / "b" / "predictions.parquet").unlink()
    assert accuracy_table(Results(open_study([tmp_path]))).rows[1][2] == "–"
    notes = " ".join(question_tables(*asked(tmp_path))[-1].notes)
    assert "A difference without ± is of one seed, and nothing is known of its chance." in notes
    assert "†" not in notes and "Bold" not in notes


def test_differences_of_rows_whose_names_are_cut_alike_have_a_line_each(tmp_path: Path, new_run: Maker) -> None:
    for seed in range(3):
        new_run(tmp_path / f"a{seed}", seed=seed)
        for order, skill in (("first", 0.6), ("second", 0.7)):
            row = f"FPT + alignment of a kind that takes {'very ' * 8}long to say, the {order}"
            new_run(tmp_path / f"{order}{seed}", row, align="mmd", seed=seed, skill=skill)
    results, frame = asked(tmp_path)
    for colours in ({"alignment": "#000000"}, None):
        with styled():
            drawn = difference_figure(results, frame, "title", "points", colours)
        assert drawn is not None
        (axes,) = drawn.figure.axes
        assert len(axes.get_yticklabels()) == 2
        assert [bar.lines[0].get_ydata()[0] for bar in axes.containers] == [0, 1]


def test_a_null_result_is_said_plainly(tmp_path: Path, new_run: Maker) -> None:
    three_seeds(tmp_path, new_run, [400, 420, 410], [405, 415, 411])
    told = told_of_one(tmp_path)
    expected = "“FPT + MMD” against “FPT”, test accuracy: +0.03 ± 0.29 points (3 seeds, p = 0.92, corrected 0.92)"
    assert told.startswith(f"{expected}: no difference could be shown")
    assert "would probably be missed" in told and "seeds would be needed to see a difference of that size" in told
    assert findings(*asked(tmp_path))[0][1] == "The one comparison shows no difference."


@pytest.mark.parametrize(("aligned", "word"), [([450, 471, 460], "gain"), ([350, 371, 360], "loss")])
def test_a_shown_difference_is_said_plainly(tmp_path: Path, new_run: Maker, aligned: list[int], word: str) -> None:
    three_seeds(tmp_path, new_run, [400, 420, 410], aligned)
    assert f"): shown to be {'better' if word == 'gain' else 'worse'}. " in told_of_one(tmp_path)
    results, frame = asked(tmp_path)
    assert findings(results, frame)[0][2][0][0] == frame.verdict[0] == word
    assert question_tables(results, frame)[0].strong == {0}


def test_equal_differences_are_undefined_not_certain(tmp_path: Path, new_run: Maker) -> None:
    assert "t is undefined" in told_of_one(three_seeds(tmp_path, new_run, [400, 420, 410], [410, 430, 420]))


def test_the_page_is_whole_and_needs_nothing_from_outside(written: Path, many: Page) -> None:
    text = (written / "page.html").read_text(encoding="utf-8")
    assert many.open == []
    assert "http://" not in text and "https://" not in text and "<script" not in text and "@import" not in text
    for tag, attributes in many.tags:
        assert tag not in {"link", "iframe", "object", "script"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert len(text) < 2_000_000


def test_the_page_is_accessible(many: Page) -> None:
    images = [attributes for tag, attributes in many.tags if tag == "img"]
    assert len(images) == 12 and all(attributes.get("alt") for attributes in images)
    drawn = [attributes for tag, attributes in many.tags if attributes.get("role") == "img"]
    assert len(drawn) == 7 and all(attributes.get("aria-label") for attributes in drawn)
    assert all(attributes.get("scope") for tag, attributes in many.tags if tag == "th")
    count = [tag for tag, _ in many.tags].count
    assert count("table") == count("caption") > 5
    assert many.text.count("✓ right") + many.text.count("✗ wrong") == 12


def test_every_id_is_used_once(many: Page) -> None:
    ids = [attributes["id"] for _, attributes in many.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_tells_what_it_must(many: Page, study_folder: Path) -> None:
    table = accuracy_table(Results(open_study([study_folder])))
    for cell in (cell for row in table.rows for cell in row):
        assert cell in many.text
    for words in (
        "Does alignment before training help?",
        "Incomplete runs",
        str(study_folder / "stopped"),
        "Learning-rate sweep",
        "some CPU",
        "0123abc",
        "crossalign adapt cifar10 --seed 2",
        "Settings that differ between rows",
        "10,000 training images, 6 epochs.",
        "Reliability",
    ):
        assert words in many.text


def test_a_page_of_one_run(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a", "FPT + MMD", align="mmd", correct=np.arange(400) < 200, images=400)
    assert report([folder]) == folder / "report.html"
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "classified 50.00 % of the test images correctly (400 images, 95 % interval 45.1 to 54.9" in page.text
    assert "Resolved configuration" in page.text and "limit_train: 10000" in page.text
    assert "patch embedding" in page.text and "3,136" in page.text
    report([folder])  # its own page in the folder does not disturb the next one


def test_only_unfinished_runs_still_make_a_page(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a", complete=False)
    page = Page(report([tmp_path], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "No run is complete" in page.text and "epoch 6 of 6" in page.text
    assert "Curves" in page.text
    assert "Incomplete runs" in summary_table([tmp_path])


def test_two_backbones_and_a_hundred_classes(tmp_path: Path, new_run: Maker) -> None:
    classes = [f"class {place}" for place in range(100)]
    for backbone in ("../models/stories260K", "package:minilm"):
        for align in ("none", "mmd"):
            name = f"FPT, {align}"
            new_run(tmp_path / backbone[-6:] / align, name, align=align, backbone=backbone, classes=classes, images=300)
    new_run(tmp_path / "vit", "Small ViT", method="vit", weights="none", classes=classes, images=300)
    page = Page(report([tmp_path], tmp_path / "page.html").read_text(encoding="utf-8"))
    for words in (
        "FPT, none, stories260K",
        "Backbone",
        "minilm",
        "Accuracy and loss, minilm",
        "Accuracy and loss, stories260K",
    ):
        assert words in page.text
    results, frame = asked(tmp_path)
    compared = [one for one in frame.itertuples() if one.question == "alignment"]
    assert {(results.row[one.reference].backbone, results.row[one.other].backbone) for one in compared} == {
        (name, name) for name in ("../models/stories260K", "package:minilm")
    }
    assert (frame.question == "backbone").sum() == 2


EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a --> b",
    "$\\frac",
    "nul\x01\x1b[31m",
    "猫 | `x`",
]


def test_names_from_outside_are_escaped(tmp_path: Path, new_run: Maker) -> None:
    for seed, name in enumerate(EVIL):
        new_run(tmp_path / f"r{seed}", name, method=f"m{seed}", seed=0, classes=EVIL, data=EVIL[0], images=60)
    told = {"title": EVIL[1], "note": EVIL[0], "commands": [EVIL[0], "``` x"]}
    (tmp_path / "study.json").write_text(json.dumps(told))
    report([tmp_path], tmp_path / "page.html", tmp_path / "page.md", figures=True)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and EVIL[0] in page.text
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onerror" in attributes]
    assert "\x01" not in text[text.index("<svg") : text.index("</svg>")]
    markdown = (tmp_path / "page.md").read_text(encoding="utf-8")
    prose = markdown[: markdown.index("## Commands")]
    assert "<script" not in prose and "<img" not in prose
    assert markdown.rstrip().endswith("````")
    for line in re.findall(r"^\|.*\|$", prose, re.MULTILINE):
        assert "| `x`" not in line


def test_the_markdown_states_what_it_rests_on(written: Path, study_folder: Path) -> None:
    text = (written / "page.md").read_text(encoding="utf-8")
    assert "Generated by `crossalign report`" in text.split("\n\n")[1]
    for words in (
        "- Seeds: 0; 1; 2",
        "some CPU",
        "0123abc",
        "crossalign reproduce cmda-table1 --small",
        "cpu (2 threads)",
    ):
        assert words in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(bars)) == 1
    table = accuracy_table(Results(open_study([study_folder])))
    assert f"| FPT + alignment (MSE) | {table.rows[1][1]} |" in text


def test_markdown_figures_are_small_and_exist(written: Path) -> None:
    named = re.findall(r"!\[.*?\]\((.*?)\)", (written / "page.md").read_text(encoding="utf-8"))
    assert len(named) == 7 and all((written / name).is_file() for name in named)
    assert sum(path.stat().st_size for path in (written / "page-figures").iterdir()) < 1_000_000


def test_markdown_without_figures(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a")
    assert report([folder], markdown=tmp_path / "out.md", figures=False) == folder / "report.html"
    assert (tmp_path / "out.md").is_file() and not (tmp_path / "out-figures").exists()


def test_a_run_without_a_test_score_says_so(tmp_path: Path, new_run: Maker) -> None:
    for name, align in (("a", "none"), ("b", "mmd")):
        folder = new_run(tmp_path / name, name, align=align, correct=np.arange(100) < 40, images=100)
        held = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(held | {"test": None}))
        (folder / "predictions.parquet").unlink()
    page = Page(report([tmp_path]).read_text(encoding="utf-8"))
    assert "classified 41.00 % of the validation images correctly (1 seed); no test image was scored" in page.text
    assert "not compared, no test accuracy" in page.text
    one = Page(report([tmp_path / "a"]).read_text(encoding="utf-8"))
    assert "no test image was scored" in one.text and "nan" not in one.text


def test_what_the_alignment_stage_warned_of_is_told(tmp_path: Path, new_run: Maker) -> None:
    folder = new_run(tmp_path / "a", "FPT + MSE", align="mse")
    held = json.loads((folder / "result.json").read_text())
    held["alignment"] = {"warning": "the embeddings collapsed"}
    (folder / "result.json").write_text(json.dumps(held))
    page = Page(report([folder]).read_text(encoding="utf-8"))
    assert "Alignment stage of “FPT + MSE”, seed 0: the embeddings collapsed" in page.text


def test_nothing_is_said_of_a_confidence_that_is_not_known(tmp_path: Path, new_run: Maker) -> None:
    path = new_run(tmp_path / "run") / "predictions.parquet"
    assert "confident" in markdown(study_page(open_study([tmp_path])))
    pq.write_table(pq.read_table(path).drop_columns(["confidence"]), path)
    page = markdown(study_page(open_study([tmp_path])))
    assert "confident" not in page and "calibrated" not in page and "commonest class" in page


def test_a_folder_where_a_file_belongs_is_told(tmp_path: Path, new_run: Maker) -> None:
    with pytest.raises(UserError, match="is a folder"):
        report([new_run(tmp_path / "a")], html=tmp_path)


def test_the_terminal_table_is_aligned(study_folder: Path) -> None:
    lines = summary_table([study_folder]).splitlines()
    assert lines[0].startswith("Method") and lines[0].endswith("Seeds")
    assert set(lines[1]) == {"-", " "}
    assert [line.rfind("3") for line in lines[2:16]] == [len(lines[0]) - 1] * 14
    assert any("stopped" in line for line in lines)


def test_a_sweep_of_many_rates_is_a_long_table(tmp_path: Path, new_run: Maker) -> None:
    new_run(tmp_path / "a")
    rates = [10 ** (-5 + place / 5) for place in range(11)]
    entries = [{"row": "FPT", "learning_rate": r, "validation_accuracy": 0.3, "chosen": r == rates[3]} for r in rates]
    (tmp_path / "sweep.json").write_text(json.dumps(entries))
    table = sweep_table(open_study([tmp_path]))
    assert table is not None and len(table.rows) == 11 and "30.00 ✓" in as_text(table)


def test_numbers_as_text() -> None:
    assert points(-0.00001) == "+0.00" and points(-0.013) == "−1.30"
    assert [p_text(p) for p in (None, 0.0004, 0.0123, 0.456)] == ["–", "<0.001", "0.012", "0.46"]


def test_importing_the_report_is_cheap() -> None:
    heavy = ("torch", "scipy", "matplotlib", "jinja2", "pandas")
    code = f"import sys, crossalign.report; print([m for m in {heavy} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "scipy"])
def test_a_missing_package_is_one_sentence(
    package: str, tmp_path: Path, new_run: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run(tmp_path / "a")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"'{package}': pip install 'crossalign\[report\]'"):
        report([folder], tmp_path / "page.html")
