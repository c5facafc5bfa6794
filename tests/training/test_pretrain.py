"""Pre-training: the model, the term beside the loss, resume, equality over micro-batches and processes, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from together import together
from torch.nn import functional as F

from crossalign import cli
from crossalign.alignment import cka
from crossalign.config import GPTConfig, PairsConfig, PretrainConfig, update
from crossalign.core import progress
from crossalign.core.errors import UserError
from crossalign.data.batches import Batches
from crossalign.data.pairs.batches import PairBatches
from crossalign.data.pairs.load import open_pairs
from crossalign.data.text.prepared import open_corpus
from crossalign.data.text.tokens import TokenRows
from crossalign.models.language.causal import new_gpt2
from crossalign.models.language.model import open_language_model
from crossalign.models.taps import Taps
from crossalign.runs.folder import read_config, write_config
from crossalign.training import loop
from crossalign.training.loop import Interrupted
from crossalign.training.term import Term
from crossalign.verbs.language_model.job import pretrain

PAIRS, WIDTH = 80, 12
TEXT = "the cat sat on a mat while two red dogs ran over wet grass and birds sang in old trees"
Make = Callable[..., PretrainConfig]


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(TEXT.split(), size=random.integers(4, 9)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, pictures with captions, and features of theirs that say how red a picture is."""
    folder = tmp_path_factory.mktemp("sources")
    random = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n".join(sentence(random) + "." for _ in range(600)))
    images, values = [], []
    for _ in range(PAIRS):
        buffer, color = BytesIO(), random.integers(0, 256, 3)
        Image.new("RGB", (4, 4), tuple(map(int, color))).save(buffer, "PNG")
        images.append(buffer.getvalue())
        values.append([*(color / 255).tolist(), *random.normal(size=WIDTH - 3).tolist()])
    ids = [f"picture {i}" for i in range(PAIRS)]
    captions = [sentence(random) for _ in ids]
    pq.write_table(pa.table({"id": ids, "image": images, "caption": captions}), folder / "pairs.parquet")
    pq.write_table(pa.table({"id": ids, "features": values}), folder / "features.parquet")
    return folder


@pytest.fixture
def make(sources: Path, tmp_path: Path) -> Make:
    """``make(align={…}, loop={…}, output=…)``: a configuration that trains in a second."""

    def build(output: str = "run", **changes: Any) -> PretrainConfig:
        values: dict[str, Any] = {
            "block": 24,
            "output": str(tmp_path / output),
            "corpus": {"source": [str(sources / "text.txt")], "vocabulary": 300, "validation_fraction": 0.1},
            "gpt": {"layers": 2, "heads": 2, "width": 16},
            "align": {"metric": "cka-linear-debiased", "every": 3, "batch_size": 16, "max_length": 12, "held_out": 8},
            "teacher": {"ref": f"file:{sources / 'features.parquet'}"},
            "pairs": {"source": str(sources / "pairs.parquet")},
            "optim": {"lr": 1e-2},
            "loop": {"steps": 8, "evaluate_every": 4, "batch_size": 6, "log_every": 2, "precision": "fp32", "device": "cpu"},
            "tracking": {"mlflow": False},
        }
        config = update(PretrainConfig(), values)
        config = update(config, {k: v for k, v in changes.items() if isinstance(v, dict)})
        return dataclasses.replace(config, **{k: v for k, v in changes.items() if not isinstance(v, dict)})

    return build


def stop_at(step: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the next run be saved and stopped after so many of its steps; the list grows with each that is trained."""
    train, done = loop._Fit._train_step, list[int]()

    def stop(self: Any, *args: Any) -> None:
        train(self, *args)
        done.append(self.step)
        if len(done) == step:
            self._save()
            raise Interrupted

    patch.setattr(loop._Fit, "_train_step", stop)
    return done


def rows(config: PretrainConfig, split: str) -> list[dict[str, Any]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output / "model" / "model.safetensors")


def test_initial_weights_are_those_of_nanogpt() -> None:
    model = new_gpt2(GPTConfig(layers=8, heads=4, width=128), vocabulary=500, block=64, separator=0, seed=0)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert not tensor.any()
        elif "ln_" in name:
            assert (tensor == 1).all()
        else:
            expected = 0.02 / (2 * 8) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert tensor.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_logits_are_those_of_gpt2_as_transformers_has_it() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = new_gpt2(GPTConfig(layers=3, heads=4, width=64), vocabulary=90, block=32, separator=0, seed=0).eval()
    config = GPT2Config(vocab_size=90, n_positions=32, n_embd=64, n_layer=3, n_head=4)  # gelu_new and eager masks
    theirs = GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 90, (3, 32))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    mask = (torch.arange(32) < 20).long().expand(3, -1)  # padding on the right, as captions have it
    a, b = (model(ids, attention_mask=mask).logits[:, :20] for model in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_folder_opens_in_transformers_and_says_the_same(make: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make()
    result = pretrain(config, quiet=True)
    theirs = AutoModelForCausalLM.from_pretrained(config.output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(config.output / "model")
    ours = new_gpt2(config.gpt, vocabulary=len(tokenizer), block=config.block, separator=0, seed=9).eval()
    ours.load_state_dict(weights(config) | {"lm_head.weight": weights(config)["transformer.wte.weight"]})
    ids = torch.tensor([tokenizer("the cat sat on wet grass")["input_ids"]])
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)
    assert result["scores"]["validation"]["perplexity"] < 300
    assert set(result["held_out"]) >= {"held_out_cka-linear-debiased", "held_out_directions"}


def test_the_first_step_is_the_mean_loss_and_one_term(make: Make) -> None:
    config = make(align={"metric": "cka-linear", "weight": 10.0}, loop={"steps": 1, "evaluate_every": 1, "log_every": 1})
    pretrain(config, quiet=True)
    from crossalign.core.files import cache_dir

    corpus = open_corpus(max(cache_dir("corpora").iterdir(), key=lambda p: p.stat().st_mtime))
    model = new_gpt2(config.gpt, vocabulary=corpus.vocabulary, block=24, separator=corpus.separator, seed=0)
    step = next(iter(Batches(TokenRows(corpus.train.tokens, 24), batch_size=6, seed=0).steps()))
    (batch,) = step.micro_batches
    logits = model(input_ids=batch["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    pairs = open_pairs(config.pairs)
    table = pq.read_table(config.teacher.ref.removeprefix("file:")).to_pydict()
    own = dict(zip(table["id"], table["features"], strict=True))
    features = torch.tensor([own[name] for name in pairs.ids])
    drawn = PairBatches(pairs.texts, features, corpus.tokenizer, batch_size=16, seed=0, max_length=12).batch(0)
    score = cka(Taps()(model, drawn.input_ids, drawn.attention_mask), drawn.features)
    (loss + 10 * (1 - score)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    (told,), (extra,) = rows(config, "train_step"), rows(config, "extra")
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert extra["score"] == pytest.approx(score.item(), rel=1e-4)
    assert told["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert extra["extra_grad_ratio"] == pytest.approx(extra["extra_grad_norm"] / told["grad_norm"], rel=1e-5)


def test_weight_zero_is_the_baseline_to_the_bit(make: Make) -> None:
    drops = {"gpt": {"dropout": 0.1}}  # a score that is only logged draws no masks
    off, zero = make("off", align={"metric": "none"}, **drops), make("zero", align={"weight": 0.0}, **drops)
    logged = make("logged", align={"weight": 0.0, "log_every": 2}, **drops)
    for config in (off, zero, logged):
        pretrain(config, quiet=True)
    assert all(torch.equal(weights(off)[name], tensor) for name, tensor in weights(zero).items())
    assert all(torch.equal(weights(off)[name], tensor) for name, tensor in weights(logged).items())
    assert [row["step"] for row in rows(logged, "extra")] == [1, 3, 5, 7] and not rows(off, "extra")


@pytest.mark.parametrize("at", [3, 4, 6])
def test_stopped_and_resumed_equals_never_stopped(make: Make, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    settings: dict[str, Any] = {"align": {"queue": 20}, "gpt": {"dropout": 0.1}}
    whole, parts = make("whole", **settings), make("parts", **settings)
    pretrain(whole, quiet=True)
    done = stop_at(at, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(parts, quiet=True)
    pretrain(parts, quiet=True)
    assert len(done) == 8
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name
    untimed = [{k: v for k, v in row.items() if "second" not in k} for row in rows(whole, "extra") + rows(whole, "validation")]
    again = [{k: v for k, v in row.items() if "second" not in k} for row in rows(parts, "extra") + rows(parts, "validation")]
    assert untimed == again


def three_runs(*files: Path) -> None:
    """A run of eight steps, one that is stopped after four, and its resumption."""
    train, done = loop._Fit._train_step, list[int]()

    def stop(self: Any, *args: Any) -> None:
        train(self, *args)
        done.append(self.step)
        if len(done) == 12:
            self._save()
            raise Interrupted

    loop._Fit._train_step = stop  # type: ignore[method-assign]
    whole, parts = (read_config(PretrainConfig(), file) for file in files)
    pretrain(whole, quiet=True)
    with pytest.raises(Interrupted):
        pretrain(parts, quiet=True)
    pretrain(parts, quiet=True)
    assert done == [1, 2, 3, 4, 5, 6, 7, 8] * 2, done


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_stopped_and_resumed_equal_never_stopped(make: Make, tmp_path: Path, shard: bool) -> None:
    settings: dict[str, Any] = {"align": {"queue": 20}, "gpt": {"dropout": 0.1}}
    settings["loop"] = {"evaluate_every": 8, "log_every": 3, "shard": shard}
    whole, parts = make("whole", **settings), make("parts", **settings)
    for config in (whole, parts):
        write_config(tmp_path / f"{config.output.name}-file", config)
    together(three_runs, *(tmp_path / f"{name}-file" / "config.yaml" for name in ("whole", "parts")))
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name
    for split in ("train_step", "extra", "validation"):
        for a, b in zip(rows(whole, split), rows(parts, split), strict=True):
            assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}


def test_models_are_kept_during_training_and_change_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept = make("plain"), make("kept", loop={"keep_every": 4})
    pretrain(plain, quiet=True)
    done = stop_at(5, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(kept, quiet=True)
    pretrain(kept, quiet=True)
    assert len(done) == 8 and all(torch.equal(weights(kept)[name], tensor) for name, tensor in weights(plain).items())
    folders = sorted((kept.output / "snapshots").iterdir())
    assert [folder.name for folder in folders] == ["step-0000000", "step-0000004", "step-0000008"]
    held = [open_language_model(str(folder), head="causal") for folder in folders]
    states = [dict(opened.model.named_parameters()) for opened in held]
    first = new_gpt2(kept.gpt, vocabulary=len(held[0].tokenizer), block=24, separator=0, seed=kept.seed)
    for name, tensor in first.named_parameters():
        assert torch.equal(states[0][name], tensor), name
        assert torch.equal(states[2][name], weights(kept).get(name, states[2][name])), name
    assert not torch.equal(states[0]["transformer.wte.weight"], states[1]["transformer.wte.weight"])
    assert not (plain.output / "snapshots").exists()


@pytest.mark.parametrize("what", ["features", "pairs"])
def test_a_run_does_not_go_on_with_other_features_or_captions(
    make: Make, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    for name in ("features", "pairs"):
        shutil.copy(sources / f"{name}.parquet", tmp_path)
    files = {"teacher": {"ref": f"file:{tmp_path / 'features.parquet'}"}, "pairs": {"source": str(tmp_path / "pairs.parquet")}}
    config = make(**files)
    stop_at(3, monkeypatch)
    with pytest.raises(Interrupted):
        pretrain(config, quiet=True)
    table = pq.read_table(tmp_path / f"{what}.parquet").to_pydict()
    if what == "features":
        table["features"] = [[2 * value for value in row] for row in table["features"]]
    else:
        table["caption"] = [f"{caption} again" for caption in table["caption"]]
    pq.write_table(pa.table(table), tmp_path / f"{what}.parquet")
    with pytest.raises(UserError, match=r"made from other text, captions or teacher's features.*put them back"):
        pretrain(config, quiet=True)
    shutil.copy(sources / f"{what}.parquet", tmp_path)
    assert pretrain(config, quiet=True)["scores"]


def test_steps_with_the_term_and_without_share_their_compiled_graphs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = {"steps": 6, "evaluate_every": 6}
    eager, compiled = (make(name, align={"every": 2}, loop=loops) for name in ("eager", "compiled"))
    plain = make("plain", align={"metric": "none"}, loop=loops)
    pretrain(eager, quiet=True)
    graphs, after_step = 0, list[int]()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compile_, train = torch.compile, loop._Fit._train_step

    def note(self: Any, *args: Any) -> None:
        train(self, *args)
        after_step.append(graphs)

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=count))
    monkeypatch.setattr(loop._Fit, "_train_step", note)
    for config in (plain, compiled):
        config.loop.compile, graphs = True, 0
        torch._dynamo.reset()
        pretrain(config, quiet=True)
    assert after_step == [after_step[0]] * 12 and after_step[0] > 0, "one set of graphs, from the first step on"
    for name, tensor in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], tensor, rtol=1e-3, atol=1e-5)
    assert [row["step"] for row in rows(compiled, "extra")] == [1, 3, 5]


def test_a_term_that_cannot_be_computed_any_more_ends_the_run_which_is_saved(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = make("whole"), make("parts")
    pretrain(whole, quiet=True)
    extra = Term.extra

    def fail(self: Term, model: Any, step: int) -> Any:
        if step == 6:
            raise ValueError("svcca of 16 rows with ranks 9 and 8 needs more rows")
        return extra(self, model, step)

    monkeypatch.setattr(Term, "extra", fail)
    write_config(tmp_path / "file", parts)
    assert cli.main(["pretrain", "--config", str(tmp_path / "file/config.yaml")]) == 1
    told = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("crossalign: ") and "extra_grad_ratio" not in line
    ]  # the term is strong
    assert len(told) == 1 and "cannot be computed at step 7 of stage 'train' (svcca of 16 rows" in told[0]
    monkeypatch.undo()
    pretrain(parts, quiet=True)
    assert all(torch.equal(weights(parts)[name], tensor) for name, tensor in weights(whole).items())
    assert [row["step"] for row in rows(parts, "train_step")] == [2, 4, 6, 8]


@pytest.mark.parametrize("quiet", [False, True])
def test_evaluation_scoring_and_tokenising_have_a_bar(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    (tmp_path / "test.txt").write_text(TEXT)
    pretrain(make(score=(str(tmp_path / "test.txt"),)), quiet=quiet)
    told = capsys.readouterr().err
    assert "evaluating: " in told and "tokenising captions: " in told
    assert all((f"scoring {name}: " in told) is not quiet for name in ("validation", "test.txt"))


def test_micro_batches_change_nothing(make: Make) -> None:
    one, four = make("one"), make("four", loop={"accumulation": 3})
    pretrain(one, quiet=True)
    pretrain(four, quiet=True)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(four)[name], tensor, rtol=1e-2, atol=1e-4)  # Adam, lr 0.01
    for a, b in zip(rows(one, "extra"), rows(four, "extra"), strict=True):
        assert a["extra_grad_norm"] == pytest.approx(b["extra_grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("metric", "shard"), [("cka-rbf", False), ("captions", False), ("cka-rbf", True), ("captions", True)])
def test_two_processes_give_what_one_gives(make: Make, tmp_path: Path, metric: str, shard: bool) -> None:
    # 7 sequences cannot be shared out evenly.
    align = {"metric": metric, "weight": 2.0, "queue": 20}
    settings: dict[str, Any] = {"align": align, "loop": {"batch_size": 7, "accumulation": 2}}
    alone, pair = make("alone", **settings), make("pair", **settings)
    pretrain(alone, quiet=True)
    pair.loop.shard = shard
    write_config(tmp_path / "file", pair)
    together(cli.main, ["pretrain", "--config", str(tmp_path / "file/config.yaml")])
    for split in ("extra", "validation", "train_step"):
        for a, b in zip(rows(alone, split), rows(pair, split), strict=True):
            for name in a.keys() - {"stage", "split", "seconds", "examples_per_second"}:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), (name, a, b)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(pair)[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "l2-weights", "koleo", "captions", "cka-rbf-debiased", "soft-mutual-knn"])
def test_every_kind_of_term_trains(make: Make, metric: str) -> None:
    config = make(align={"metric": metric, "weight": 0.5})
    result = pretrain(config, quiet=True)
    assert result["align"] == metric and len(rows(config, "extra")) == 3
    assert all(row["extra_grad_norm"] > 0 for row in rows(config, "extra"))
    assert result["row"].startswith(f"Pre-training + {metric} (") and "λ = 0.5, every 3" in result["row"]


def test_the_set_ups_of_pairs_differ_and_the_mean_needs_a_metric_without_centring(make: Make) -> None:
    scores = []
    for mode, metric in (("paired", "cka-linear"), ("unpaired", "cka-linear"), ("mean", "kernel-alignment")):
        config = make(mode, align={"mode": mode, "metric": metric})
        pretrain(config, quiet=True)
        scores.append(rows(config, "extra")[0]["score"])
    assert len(set(scores)) == 3
    with pytest.raises(UserError, match="kernel-alignment"):
        pretrain(make("centred", align={"mode": "mean"}), quiet=True)


def test_held_out_pairs_are_never_trained_on(make: Make, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"picture {i}" for i in range(PAIRS)))
    with pytest.raises(UserError, match="held-out pairs are trained on"):
        pretrain(make(pairs={"split_file": str(tmp_path / "list.txt")}), quiet=True)
    with pytest.raises(UserError, match="held-out pairs are trained on"):
        pretrain(make(align={"batch_size": 4}, pairs={"split": "validation"}), quiet=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loop": {"shard": True}}, "needs several processes"),
        ({"align": {"queue": 60}}, "some of the .* pairs twice"),
        ({"block": 10_000}, "fewer than a block"),
        ({"align": {"layers": ["7"]}}, "there is no layer 7: the model has the layers 0 to 2"),
        ({"align": {"metric": "cca"}}, "the alignment term cannot be computed"),
        ({"align": {"metric": "ckaa"}}, "did you mean"),
        ({"align": {"metric": "mutual-knn"}}, "has no gradient"),
        ({"align": {"weight": float("nan")}}, "--align.weight is nan; it must be a finite number, 0 or more"),
        ({"align": {"weight": float("inf")}}, "--align.weight is inf"),
        ({"align": {"weight": -1.0}}, "--align.weight is -1.0"),
        ({"align": {"metric": "cka-rbf", "batch_size": 2}}, "--align.batch-size 2: cka needs at least 3 points"),
        ({"align": {"held_out": 3}}, "--align.held-out is 3; it must be 0, or at least 8 pairs"),
        ({"align": {"held_out": -5}}, "--align.held-out is -5"),
        ({"optim": {"clip": -1.0}}, "--optim.clip is -1.0; it must be a finite number, 0 or more"),
        ({"optim": {"warmup_fraction": 20.0}}, "--optim.warmup-fraction is 20.0; it must be a share from 0 to 1"),
        ({"optim": {"betas": (0.9, 1.0)}}, "--optim.betas is 0.9 1.0; each must be from 0 to 0.999999"),
        ({"gpt": {"dropout": 1.5}}, "--gpt.dropout is 1.5"),
        ({"optim": {"lr": float("nan")}}, "--optim.lr is nan; it must be a finite number, 0 or more"),
        ({"corpus": {"source": []}}, "--corpus.source names no text.*python:topics"),
        ({"align": {"batch_size": 500}}, "a batch of 500 pairs"),
        ({"align": {"max_length": 100}}, "longer than --block 24"),
        ({"align": {"metric": "none", "max_length": 100}}, "longer than --block 24"),
        ({"loop": {"steps": 10, "evaluate_every": 4}}, "does not divide --loop.steps 10; 2 would"),
        ({"gpt": {"heads": 3}}, "is not a multiple of --gpt.heads 3"),
        ({"pairs": {"source": "nowhere.parquet"}}, "nowhere.parquet"),
        ({"teacher": {"ref": "file:nowhere.npy"}}, "nowhere.npy"),
        ({"corpus": {"source": ["nowhere.txt"]}}, "nowhere.txt"),
        ({"score": ("nowhere.txt",)}, "nowhere.txt"),
        ({"loop": {"batch_size": 100_000}}, "larger than the set"),
    ],
)
def test_bad_input_is_told_before_any_training(make: Make, changes: dict[str, Any], says: str) -> None:
    config = make(**changes)
    with pytest.raises(UserError, match=says):
        pretrain(config, quiet=True)
    assert not (config.output / "model").exists() and not (config.output / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"score": ("nowhere.txt",)}, "nowhere.txt"),
        ({"score": ("{folder}/latin.txt",)}, "give a UTF-8 text file"),
        ({"score": ("{folder}/test.txt", "{folder}/other/test.txt")}, "'test.txt' is that of another text"),
        ({"score": ("{folder}/validation",)}, "'validation' is that of the run's own held-out text"),
        ({"pairs": {"source": "nowhere.parquet"}}, "nowhere.parquet"),
        ({"pairs": {"split_file": "nowhere.list"}}, "nowhere.list"),
        ({"align": {"held_out_file": "nowhere.list"}}, "nowhere.list"),
        ({"teacher": {"ref": "file:nowhere.npy"}}, "nowhere.npy"),
        ({"teacher": {"ref": "nowhere"}}, "nowhere"),
        ({"teacher": {"ref": "random:package:mobilenet_v2", "layers": ["99"]}}, "there is no layer 99"),
        ({"align": {"held_out_teacher": "file:nowhere.npy"}}, "nowhere.npy"),
        ({"align": {"batch_size": 3}}, "--align.batch-size 3: .*at least 4 points.*raise it"),
        ({"align": {"batch_size": 8, "metric": "soft-mutual-knn"}}, "--align.batch-size 8: 10 nearest.*raise it"),
    ],
)
def test_what_does_not_exist_is_told_before_the_corpus_is_prepared(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("test.txt", "other/test.txt", "validation"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    if "score" in changes:
        changes = {"score": tuple(path.format(folder=tmp_path) for path in changes["score"])}
    monkeypatch.setattr(sys.modules[pretrain.__module__], "prepare", lambda _: pytest.fail("prepared"))
    with pytest.raises(UserError, match=says):
        pretrain(make(**changes), quiet=True)


def test_texts_to_score_have_a_place_each(make: Make, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.txt", "two.txt")]
    for path, text in zip(paths, (TEXT, "zebra xylophone quiz"), strict=True):
        path.write_text(text)
    scores = pretrain(make(score=tuple(map(str, paths))), quiet=True)["scores"]
    assert scores.keys() == {"validation", "one.txt", "two.txt"}
    assert scores["one.txt"]["loss"] < scores["validation"]["loss"] * 1.5 < scores["two.txt"]["loss"] * 1.5


def test_the_largest_seed_trains(make: Make) -> None:
    pretrain(make(seed=2**32 - 1), quiet=True)


@pytest.mark.parametrize(("metric", "count"), [("cka-linear-debiased", 3), ("soft-mutual-knn", 8)])
def test_too_few_pairs_for_a_metric_are_one_sentence(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, count: int
) -> None:
    write_config(tmp_path / "file", make(align={"metric": metric, "batch_size": count}))
    assert cli.main(["pretrain", "--config", str(tmp_path / "file/config.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"--align.batch-size {count}" in told and "raise it" in told


@pytest.mark.parametrize("kind", ["own", "written"])
def test_features_of_the_training_pairs_alone_need_others_for_the_held_out_ones(
    make: Make, sources: Path, tmp_path: Path, kind: str
) -> None:
    table = pq.read_table(sources / "features.parquet").to_pydict()
    own, refs = dict(zip(table["id"], table["features"], strict=True)), {}
    for split in ("train", "validation"):
        pairs = open_pairs(PairsConfig(source=str(sources / "pairs.parquet"), split=split))
        values = torch.tensor([own[name] for name in pairs.ids])
        refs[split] = tmp_path / f"{split}.npy"
        if kind == "own":
            np.save(refs[split], values.numpy())
        else:
            refs[split] = refs[split].with_suffix(".safetensors")
            told = {"format": "crossalign.features.1", "teacher_key": "k", "pairs": pairs.source}
            save_file({"features": values}, refs[split], told | {"pairs_fingerprint": pairs.fingerprint})
    train = {"ref": f"file:{refs['train']}"}
    with pytest.raises(UserError, match=r"--align.held-out-teacher file:PATH.*--align.held-out 0"):
        pretrain(make("default", teacher=train), quiet=True)
    none = pretrain(make("none", teacher=train, align={"held_out": 0}), quiet=True)
    assert not none["held_out"]
    both = make("both", teacher=train, align={"held_out_teacher": f"file:{refs['validation']}"})
    assert pretrain(both, quiet=True)["held_out"] == pretrain(make("parquet"), quiet=True)["held_out"]


def test_fewer_held_out_pairs_than_asked_for_are_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(make(align={"held_out": 1000}, loop={"steps": 1, "evaluate_every": 1}), quiet=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "held-out" in line]
    assert len(told) == 1 and "--align.held-out 1000 is more than there are: all 8 are used (pairs.parquet" in told[0]


def test_a_degenerate_metric_is_told_in_one_sentence(
    make: Make, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    pretrain(make(align={"metric": "cca", "on_degenerate": "warn", "log_every": 1}), quiet=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "rows" in line]
    assert len(told) == 1 and told[0].startswith("crossalign: cca of 16 rows with ranks")
    assert not [one for one in recwarn if "cca" in str(one.message)]


def test_pairs_with_empty_captions_or_broken_images_are_named(make: Make, sources: Path, tmp_path: Path) -> None:
    table = pq.read_table(sources / "pairs.parquet").to_pydict()
    table["caption"][3], table["image"][5] = " ", b"no image"
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=r"--pairs\.on-error skip"):
        pretrain(make(pairs={"source": str(tmp_path / "pairs.parquet")}), quiet=True)
    config = make("skipping", pairs={"source": str(tmp_path / "pairs.parquet"), "on_error": "skip"})
    assert pretrain(config, quiet=True)["scores"]


def test_the_command_line_runs_a_recipe(make: Make, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    write_config(config.output.parent / "file", config)
    assert cli.main(["pretrain", "small-pretrain", "--config", str(config.output.parent / "file" / "config.yaml")]) == 0
    assert "validation perplexity" in capsys.readouterr().out
    assert cli.main(["pretrain", "cmda-fpt"]) == 2
    assert "is a recipe of crossalign adapt" in capsys.readouterr().err


def test_two_tiny_rows_are_compared(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        pretrain(make(f"rows/plain-{seed}", seed=seed, row="Plain", align={"metric": "none"}, loop={"steps": 4}))
        pretrain(make(f"rows/aligned-{seed}", seed=seed, row="Aligned", loop={"steps": 4}))
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "rows")]) == 0
    shown = capsys.readouterr().out
    assert "reference: Plain" in shown and "“Aligned” against “Plain”, loss on validation: " in shown
    assert "seeds would be needed to see a difference of that size" in shown and "crossalign evaluate" in shown
