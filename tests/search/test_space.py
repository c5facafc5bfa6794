"""What a space's file may hold: mistakes are told before any work, and conditions decide what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossalign.config import AdaptConfig, FinetuneConfig, PretrainConfig, SearchConfig, update
from crossalign.core.errors import UserError
from crossalign.recipes.space import Space, open_space
from crossalign.studies.tune import tune

METHODS = "tune.method: [fpt, lora]\n"


def opened(tmp_path: Path, text: str, **tune: object) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return open_space(str(file), update(AdaptConfig(), {"tune": tune}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lrr: [1]\n", "did you mean 'lr'"),
        ("optim.lr: {low: 1, hihg: 2}\n", "did you mean 'high'"),
        ("optim.lr: {low: 0, high: 1, log: true}\n", "log scale begins above 0"),
        ("optim.lr: {low: 2, high: 1}\n", "low must not be above high"),
        ("optim.lr: 3\n", "give a list of choices"),
        ("optim.optimizer: [adam, sgd]\n", "sgd"),
        ("loop.batch_size: [many]\n", "holds 'many'"),
        ("loop.epochs: [1, 2]\n", "the rungs count them"),
        ("data.validation_fraction: [0.1, 0.2]\n", "must be scored alike"),
        ("seed: [1, 2]\n", "scored alike"),
        ("optim.lr: {choices: [1], when: optim.optimiser == adam}\n", "'when' of 'optim.lr': optim. 'optimiser'.*'optimizer'"),
        ("optim.lr: {choices: [1], when: sometimes}\n", "FIELD == VALUE"),
        ("optim.lr: {choices: [1], when: optim.optimizer == adam}\noptim.optimizer: [adam, adamw]\n", "must stand before"),
        ("- a\n", "holds no fields"),
        ("a: [\n", "is no YAML"),
        # Numbers that are none, and switches that are no switches.
        ("loop.batch_size: {low: 1, high: .inf, int: true}\n", "'loop.batch_size', holds inf: give a finite number"),
        ("optim.lr: {low: 1, high: .inf}\n", "'optim.lr', holds inf: give a finite number"),
        ("optim.lr: {low: -.inf, high: 1}\n", "'optim.lr', holds -inf: give a finite number"),
        ("optim.lr: {low: .nan, high: 1}\n", "'optim.lr', holds nan: give a finite number"),
        ("optim.lr: {low: 1, high: 1e999}\n", "'optim.lr', holds inf: give a finite number"),
        (f"loop.batch_size: {{low: 1, high: 1{'0' * 400}, int: true}}\n", "'loop.batch_size', holds 10+: give a finite number"),
        ("optim.lr: {low: -1.0e+308, high: 1.0e+308}\n", "'optim.lr', holds -1e.308: give a finite number"),
        ("optim.lr: [.nan, 1]\n", "'optim.lr', holds nan: give a finite number"),
        ("optim.lr: [inf, 1]\n", "'optim.lr', holds inf: give a finite number"),
        ("optim.lr: {low: 1, high: 2, log: 'no'}\n", "'optim.lr', has log: 'no': write true or false"),
        ("optim.lr: {low: 1, high: 2, log: 1}\n", "'optim.lr', has log: 1: write true or false"),
        ("loop.batch_size: {low: 1, high: 2, int: }\n", "'loop.batch_size', has int: None: write true or false"),
        ("loop.batch_size: {low: 8, high: 64}\n", "without int: true: loop.batch_size' holds 8.0; it takes int"),
        # Two answers to one question.
        ("optim.lr: {choices: [1], low: 1, high: 2}\n", r"'optim.lr', has choices \[1\] and low: 1, high: 2: give either"),
        ("optim.lr: {choices: [1], log: true}\n", r"'optim.lr', has choices \[1\] and log: True: give either"),
        ("optim.lr: [1]\nhead.dropout: [0.1]\noptim.lr: [2]\n", "gives 'optim.lr' twice: keep one"),
        ("optim.lr: {low: 1, high: 2, high: 3}\n", "'optim.lr', gives 'high' twice: keep one"),
        # Nothing, and what is no field or no plain value.
        ("optim.lr:\n", "'optim.lr', holds None: give a list of choices, or low and high"),
        ("optim.lr: {low: , high: 1}\n", "'optim.lr', needs choices, or low and high as numbers"),
        ("optim.lr: {choices: }\n", "'optim.lr', has choices None: give a list"),
        ("optim.lr: []\n", r"'optim.lr', has choices \[\]: give a list"),
        ("optim.lr: [null, 1]\n", "optim.lr' holds None; it takes float"),
        ("optim.lr: [[1], 2]\n", r"'optim.lr', holds \[1\]: give plain values"),
        ("align.corpus: [2024-01-01]\n", "'align.corpus', holds datetime.*: give plain values"),
        ("align.corpus: [2024-13-01]\n", "is no YAML: month"),
        ("optim.lr: {choices: [1], when: }\n", "'optim.lr', has when: None: write FIELD == VALUE"),
        ("optim: {lr: [1]}\n", "'optim', is a section: write a line a field, such as 'optim.lr: "),
        ("optim: [adam]\n", "'optim', is a section: write a line a field, such as 'optim."),
        ("data: {augment: {flip: [true]}}\n", r"'data', is a section: .*'data\.augment\."),
        ("data: {source: [a]}\n", "varies 'data.source', which a search cannot: trials must be scored alike"),
        # Conditions that can never hold.
        (
            "optim.lr: {choices: [1], when: tune.method == lra}\n",
            "'when' of 'optim.lr': tune.method' 'lra'; did you mean 'lora'",
        ),
        ("optim.lr: {choices: [1], when: embedder.match_scale == 1}\n", "'when' of 'optim.lr': .*holds 1; it takes bool"),
        ("optim.lr: {choices: [1], when: loop.batch_size == many}\n", "'when' of 'optim.lr': .*holds 'many'; it takes int"),
        ("optim.lr: {choices: [1], when: align.metric == null}\n", "'when' of 'optim.lr': .*holds None; it takes str"),
        ("optim.lr: {choices: [1], when: head.dropout == .nan}\n", "'when' of 'optim.lr', holds nan: give a finite number"),
        ("optim.lr: {choices: [1], when: 'head.dropout == ['}\n", "FIELD == VALUE"),
        ("optim.lr: {choices: [1], when: tune == lora}\n", "'when' of 'optim.lr': tune' holds 'lora'; it is a section"),
        (METHODS + "optim.lr: {choices: [1], when: tune.method == full}\n", "'tune.method' is never that in this space"),
        (METHODS + "optim.lr: {choices: [1], when: tune.method != full}\n", "'tune.method' is never that in this space"),
        (
            "tune.method: [fpt]\noptim.lr: {choices: [1], when: tune.method != fpt}\n",
            "'tune.method' is never that in this space",
        ),
        (
            "head.dropout: {low: 0, high: 1}\noptim.lr: {choices: [1], when: head.dropout == 0.5}\n",
            "is never that in this space",
        ),
        (
            "loop.batch_size: {low: 8, high: 9, int: true}\noptim.lr: {choices: [1], when: loop.batch_size == 7}\n",
            "is never that",
        ),
        ("tune.lora_rank: {choices: [4, 8], when: tune.lora_rank == 4}\n", "must stand before"),
        # Nothing is left for this recipe.
        ("tune.lora_rank: {choices: [4], when: tune.method == lora}\n", "'tune.lora_rank' needs tune.method == lora, .* = fpt"),
    ],
)
def test_a_space_that_cannot_be_is_told_before_any_work(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as told:
        tune(SearchConfig(recipe="small-fpt", space=str(file), output=tmp_path / "out"))
    assert "space.yaml" in str(told.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_no_utf8_is_told(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("# für\noptim.lr: [1]\n", encoding=encoding)
    with pytest.raises(UserError, match=r"space\.yaml is no UTF-8 text .*: save it as UTF-8"):
        open_space(str(file), AdaptConfig())


def test_conditions_decide_what_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("tune.method: [fpt, lora]\ntune.lora_rank: {choices: [4, 8], when: tune.method == lora}\n")
    space = open_space(str(file), AdaptConfig())
    drawn = [space.draw(AdaptConfig(), seed) for seed in range(40)]
    assert {d["tune.method"] for d in drawn} == {"fpt", "lora"}
    assert all(("tune.lora_rank" in d) == (d["tune.method"] == "lora") for d in drawn)


@pytest.mark.parametrize(
    ("other", "when", "holds"),
    [
        ("embedder.match_scale: [true, false]", "embedder.match_scale == true", True),
        ("embedder.match_scale: [true, false]", "embedder.match_scale != yes", False),
        ("optim.weight_decay: [0.001, 0.1]", "optim.weight_decay == 1e-3", 0.001),
        ("optim.weight_decay: [1e-3, '0.1']", "optim.weight_decay == 0.001", 0.001),
        ("optim.weight_decay: [0, 1]", "optim.weight_decay == 0.0", 0.0),
        ("loop.batch_size: {low: 8, high: 9, int: true}", "loop.batch_size == 8", 8),
        ("tune.method: [fpt, lora]", "tune.method=='lora'", "lora"),
    ],
)
def test_a_condition_compares_values_and_not_their_text(tmp_path: Path, other: str, when: str, holds: object) -> None:
    space = opened(tmp_path, f'{other}\noptim.lr: {{choices: [1], when: "{when}"}}\n')
    drawn = [space.draw(AdaptConfig(), seed) for seed in range(40)]
    name = other.split(":")[0]
    assert {d[name] == holds for d in drawn} == {True, False}
    assert all(("optim.lr" in d) == (d[name] == holds) for d in drawn)


@pytest.mark.parametrize(
    ("method", "names"), [("lora", ["optim.lr", "tune.lora_rank", "tune.lora_alpha"]), ("fpt", ["optim.lr"])]
)
def test_what_hangs_on_a_field_that_is_out_is_out(tmp_path: Path, method: str, names: list[str]) -> None:
    rank = "tune.lora_rank: {choices: [4, 8], when: tune.method == lora}\n"
    text = f"optim.lr: [1]\n{rank}tune.lora_alpha: {{choices: [16], when: tune.lora_rank != 4}}\n"
    assert [field.name for field in opened(tmp_path, text, method=method).fields] == names
    space = opened(tmp_path, METHODS + text)
    drawn = [space.draw(AdaptConfig(), seed) for seed in range(40)]
    assert {d.get("tune.lora_rank") for d in drawn} == {None, 4, 8}
    assert all(("tune.lora_alpha" in d) == (d.get("tune.lora_rank") == 8) for d in drawn)


@pytest.mark.parametrize("config", [AdaptConfig(), PretrainConfig(), FinetuneConfig()])
def test_a_space_that_was_shown_can_be_given_back(
    tmp_path: Path, config: AdaptConfig | PretrainConfig | FinetuneConfig
) -> None:
    space = open_space("", config)
    file = tmp_path / "space.yaml"
    file.write_text(space.text())
    assert open_space(str(file), config) == space
