"""A setting without effect is told in a line, whichever verb it is given to, and stands in no row's name."""

from __future__ import annotations

import pytest
from test_bounds import CONFIGS, make

from crossalign import cli
from crossalign.config import PretrainConfig, flatten, to_dict, update
from crossalign.config.effect import _RULES, _read
from crossalign.verbs.language_model import row_name


@pytest.mark.parametrize(
    "call,says",
    [
        ("plan small-fpt --align.lr 1e-3", "--align.lr has no effect: it matters only where --align.metric is not none, and"),
        ("plan small-fpt --align.corpus /no/file", "--align.corpus has no effect: it matters only where --align.metric is not"),
        ("plan small-fpt-mmd --align.corpus /no/file", "where --align.target is corpus, and --align.target is vocabulary"),
        ("plan small-fpt-mse --align.mmd-estimator orca", "where --align.metric is mmd, and --align.metric is mse"),
        (
            "plan small-fpt --tune.lora-rank=4",
            "--tune.lora-rank has no effect: it matters only where --tune.method is lora, and",
        ),
        ("plan small-fpt --optim.schedule constant --optim.final-lr-fraction .1", "where --optim.schedule is not constant"),
        ("plan small-fpt --tracking.no-mlflow --tracking.experiment x", "--tracking.experiment has no effect"),
        ("plan small-pretrain-l2 --align.queue 64", "--align.queue has no effect"),
        ("plan small-pretrain-l2 --align.mode unpaired", "--align.mode has no effect"),
        ("plan small-pretrain-l2 --align.held-out 0 --teacher.layers 6", "--teacher.layers has no effect"),
        ("plan small-pretrain-captions --align.held-out 0 --align.layers last", "--align.layers has no effect"),
        (
            "plan small-pretrain-baseline --align.held-out 0 --pairs.limit 9",
            "--pairs.limit has no effect: it matters only where",
        ),
        ("plan small-pretrain --teacher.weights 1", "--teacher.weights has no effect: it matters only where --teacher.combine"),
        ("plan small-fpt --embedder.no-match-scale --tune.method lora --tune.lora-rank 4", ""),
        ("plan small-pretrain-baseline --align.held-out 64 --pairs.limit 99 --align.layers last --teacher.pool mean", ""),
        ("plan small-pretrain --align.queue 4 --align.mode unpaired", ""),
        ("plan small-fpt --data.resize pad", ""),  # photographs get a size where none is given
    ],
)
def test_what_has_no_effect_is_told_in_a_line(call: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(call.split()) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(says) and says in "".join(said)


def test_settings_that_a_prepared_corpus_would_belie_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--corpus.source other.txt", "--corpus.vocabulary 999"):
        assert cli.main(f"pretrain --prepared P {option}".split()) == 2
        assert "has no effect: it matters only where --prepared is empty, and --prepared is P" in capsys.readouterr().err


def test_every_rule_is_of_settings_that_there_are() -> None:
    everything = [flatten(to_dict(make(kind))) for kind in CONFIGS]
    names = {name for settings in everything for name in settings}
    sections = {name.partition(".")[0] for name in names if "." in name}
    assert set(_RULES) <= names | sections
    for name, rules in _RULES.items():
        for rule in rules:
            options = [_read(text).name for text in rule.split(" or ")]
            places = [s for s in everything if any(key.startswith(name) for key in s) and set(options) <= s.keys()]
            assert places, f"{name}: {rule}"


@pytest.mark.parametrize(
    "align,teacher,name",
    [
        ({"metric": "l2", "queue": 64, "mode": "unpaired"}, {"layers": ["6"], "ref": "random:x"}, "Pre-training + l2"),
        ({"metric": "captions", "weight": 1.0, "layers": ["last"], "queue": 8}, {}, "Pre-training + captions"),
        ({"metric": "l2", "layers": ["last"]}, {}, "Pre-training + l2 (layers last)"),
        (
            {"metric": "cka-rbf", "queue": 64, "mode": "unpaired", "held_out": 0},
            {"ref": "random:timm:vit"},
            "Pre-training + cka-rbf (unpaired, random teacher, vit, queue 64)",
        ),
    ],
)
def test_rows_are_named_by_what_was_used(align: dict[str, object], teacher: dict[str, object], name: str) -> None:
    assert row_name(update(PretrainConfig(), {"align": align, "teacher": teacher})) == name
