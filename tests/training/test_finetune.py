"""Fine-tuning: only answers are learned, in full or by LoRA, packed or not; what is saved opens again."""

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
from safetensors.torch import load_file
from together import together
from torch.nn import functional as F

from crossalign import cli
from crossalign.config import FinetuneConfig, update
from crossalign.core import progress
from crossalign.core.errors import UserError
from crossalign.data.text.instructions import open_instructions
from crossalign.data.text.tokenizer import open_tokenizer, save_tokenizer, train_tokenizer
from crossalign.verbs.language_model.job import finetune

Make = Callable[..., FinetuneConfig]
WIDTH = 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer, tasks, and pairs with features."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sources")
    tasks = [{"prompt": f"Add {i} and {i}. ", "completion": f"The sum is {2 * i}, and so on."} for i in range(60)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    words = [f"picture number {i} shows {i % 7} red cats" for i in range(60)]
    tokenizer = train_tokenizer([json.dumps(tasks), *words], 400)
    save_tokenizer(tokenizer, folder / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    images = []
    for i in range(60):
        buffer = BytesIO()
        Image.new("RGB", (4, 4), (4 * i, 0, 0)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    ids = [str(i) for i in range(60)]
    pq.write_table(pa.table({"id": ids, "image": images, "caption": words}), folder / "pairs.parquet")
    values = np.random.default_rng(0).normal(size=(60, WIDTH)).tolist()
    pq.write_table(pa.table({"id": ids, "features": values}), folder / "features.parquet")
    return folder


@pytest.fixture
def make(sources: Path, tmp_path: Path) -> Make:
    def build(output: str = "run", **changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {
            "output": str(tmp_path / output),
            "model": str(sources / "llama"),
            "data": {"source": [str(sources / "tasks.json")], "block": 96},
            "align": {"metric": "cka-linear-debiased", "every": 2, "batch_size": 12, "max_length": 16, "held_out": 0},
            "teacher": {"ref": f"file:{sources / 'features.parquet'}"},
            "pairs": {"source": str(sources / "pairs.parquet")},
            "optim": {"lr": 1e-2},
            "loop": {"steps": 4, "evaluate_every": 2, "batch_size": 6, "log_every": 1, "precision": "fp32", "device": "cpu"},
            "tracking": {"mlflow": False},
        }
        config = update(FinetuneConfig(), values)
        config = update(config, {k: v for k, v in changes.items() if isinstance(v, dict)})
        return dataclasses.replace(config, **{k: v for k, v in changes.items() if not isinstance(v, dict)})

    return build


def steps(config: FinetuneConfig, split: str = "train_step") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def test_the_first_loss_is_the_mean_over_answers(make: Make) -> None:
    from transformers import AutoModelForCausalLM

    config = make(align={"metric": "none"}, loop={"batch_size": 54, "steps": 1, "evaluate_every": 1})
    finetune(config, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(config.model).eval()
    data = open_instructions(config.data, open_tokenizer(config.model)).train
    assert len(data) == 54
    total = 0.0
    for i in range(len(data)):  # one by one: no padding, no mask
        tokens = torch.from_numpy(data.tokens[data.bounds[i] : data.bounds[i + 1]].astype(np.int64))
        losses = F.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="none")
        total += float(losses[max(int(data.prompts[i]), 1) - 1 :].sum())
    assert steps(config)[0]["loss"] == pytest.approx(total / int(data.targets.sum()), rel=1e-5)


@pytest.mark.parametrize("form", [{"padding": "left"}, {"packing": True}, {"packing": True, "padding": "left"}])
def test_padding_and_packing_change_no_loss(make: Make, form: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"align": {"metric": "none"}}
    plain = make("plain", **settings, loop={"batch_size": 54, "steps": 1, "evaluate_every": 1})
    rows = 54
    if form.get("packing"):
        from crossalign.data.text.instructions import pack

        tokenizer = open_tokenizer(plain.model)
        rows = len(pack(open_instructions(plain.data, tokenizer).train.lengths, 96))
        assert rows < 54
    other = make("other", **settings, data=form, loop={"batch_size": rows, "steps": 1, "evaluate_every": 1})
    finetune(plain, quiet=True)
    finetune(other, quiet=True)
    for key in ("loss", "grad_norm"):
        assert steps(plain)[0][key] == pytest.approx(steps(other)[0][key], rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_and_opens_again(make: Make, method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make(tune={"method": method, "lora_rank": 4}, loop={"steps": 12, "evaluate_every": 6})
    result = finetune(config, quiet=True)
    first, last = (row["loss"] for row in (steps(config, "validation")[0], steps(config, "validation")[-1]))
    assert last < first and result["scores"]["answers"]["loss"] == pytest.approx(last)
    assert len(steps(config, "extra")) == 6 and all(row["extra_grad_norm"] > 0 for row in steps(config, "extra"))
    if method == "lora":
        assert result["parameters"]["trainable"] < 0.5 * result["parameters"]["total"]
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), config.output / "model")
    else:
        model = AutoModelForCausalLM.from_pretrained(config.output / "model")
    tokenizer = AutoTokenizer.from_pretrained(config.output / "model")
    ids = torch.tensor([tokenizer("The sum is")["input_ids"]])
    untrained = AutoModelForCausalLM.from_pretrained(config.model)
    assert not torch.allclose(model(ids).logits, untrained(ids).logits, atol=1e-3)


def test_weight_zero_is_the_baseline_to_the_bit(make: Make) -> None:
    off, zero = make("off", align={"metric": "none"}), make("zero", align={"weight": 0.0})
    finetune(off, quiet=True)
    finetune(zero, quiet=True)
    one, other = (load_file(config.output / "model" / "model.safetensors") for config in (off, zero))
    assert one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_evaluation_and_tokenising_have_a_bar(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    finetune(make(), quiet=True)
    told = capsys.readouterr().err
    assert "evaluating: " in told and "tokenising instructions: " in told


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "--model names no language model"),
        ({"model": "nowhere"}, "nowhere"),
        ({"tune": {"method": "fpt"}}, "full or lora"),
        ({"data": {"block": 1000}}, r"sees 128 tokens: lower --data.block 1000$"),
        ({"tune": {"method": "lora"}, "loop": {"keep_every": 2}}, "--loop.keep-every keeps whole models, and LoRA trains none"),
        ({"loop": {"keep_every": -1}}, "--loop.keep-every is -1"),
        ({"align": {"max_length": 1000}}, r"sees 128 tokens: lower --align.max-length 1000$"),
        ({"data": {"source": ["nowhere.json"]}}, "nowhere.json"),
        ({"loop": {"batch_size": 1000}}, "larger than the set"),
        ({"align": {"layers": ["9"]}}, "there is no layer 9"),
        ({"loop": {"evaluate_blocks": 4}}, "--loop.evaluate-blocks is for pre-training"),
    ],
)
def test_bad_input_is_told_before_any_training(make: Make, changes: dict[str, Any], says: str) -> None:
    config = make(**changes)
    with pytest.raises(UserError, match=says):
        finetune(config, quiet=True)
    assert not (config.output / "model").exists() and not (config.output / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"score": ("nowhere.txt",)}, "nowhere.txt"),
        ({"score": ("{folder}/answers",)}, "'answers' is that of the run's own held-out text"),
        ({"score": ("{folder}/test.txt", "{folder}/test.txt")}, "'test.txt' is that of another text"),
        ({"pairs": {"source": "nowhere.parquet"}}, "nowhere.parquet"),
        ({"teacher": {"ref": "file:nowhere.npy"}}, "nowhere.npy"),
        ({"align": {"batch_size": 3}}, "--align.batch-size 3"),
    ],
)
def test_what_does_not_exist_is_told_before_a_model_is_opened(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    for name in ("test.txt", "answers"):
        (tmp_path / name).write_text("some text")
    if "score" in changes:
        changes = {"score": tuple(path.format(folder=tmp_path) for path in changes["score"])}
    monkeypatch.setattr(sys.modules[finetune.__module__], "open_language_model", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UserError, match=says):
        finetune(make(**changes), quiet=True)


def test_lora_in_shares_over_two_processes_gives_what_one_gives(make: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from crossalign.runs.folder import write_config

    settings: dict[str, Any] = {"tune": {"method": "lora", "lora_rank": 4, "lora_dropout": 0.0}, "data": {"packing": True}}
    alone, pair = make("alone", **settings), make("pair", **settings)
    finetune(alone, quiet=True)
    pair.loop.shard = True
    write_config(tmp_path / "file", pair)
    together(cli.main, ["finetune", "--config", str(tmp_path / "file" / "config.yaml")])
    for a, b in zip(steps(alone), steps(pair), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-3)
    one, two = (load_file(config.output / "model" / "adapter_model.safetensors") for config in (alone, pair))
    assert one.keys() == two.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(alone.model), pair.output / "model")


def test_stopped_and_resumed_equals_never_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossalign.training import loop

    settings: dict[str, Any] = {"tune": {"method": "lora", "lora_rank": 4}, "align": {"log_every": 1, "queue": 8}}
    whole, parts = make("whole", **settings), make("parts", **settings)
    finetune(whole, quiet=True)
    train, done = loop._Fit._train_step, 0

    def stop(self: Any, *args: Any) -> None:
        nonlocal done
        train(self, *args)
        done += 1
        if done == 3:
            self._save()
            raise loop.Interrupted

    monkeypatch.setattr(loop._Fit, "_train_step", stop)
    with pytest.raises(loop.Interrupted):
        finetune(parts, quiet=True)
    finetune(parts, quiet=True)
    one, two = (load_file(config.output / "model" / "adapter_model.safetensors") for config in (whole, parts))
    assert done == 4 and all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert [row["score"] for row in steps(whole, "extra")] == [row["score"] for row in steps(parts, "extra")]


@pytest.mark.parametrize("what", ["features", "pairs"])
def test_a_run_does_not_go_on_with_other_features_or_captions(
    make: Make, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from crossalign.training import loop

    for name in ("features", "pairs"):
        shutil.copy(sources / f"{name}.parquet", tmp_path)
    config = make(teacher={"ref": f"file:{tmp_path / 'features.parquet'}"}, pairs={"source": str(tmp_path / "pairs.parquet")})
    train = loop._Fit._train_step

    def stop(self: Any, *args: Any) -> None:
        train(self, *args)
        self._save()
        raise loop.Interrupted

    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted):
        patch.setattr(loop._Fit, "_train_step", stop)
        finetune(config, quiet=True)
    table = pq.read_table(tmp_path / f"{what}.parquet").to_pydict()
    if what == "features":
        table["features"] = [[2 * value for value in row] for row in table["features"]]
    else:
        table["caption"] = [f"{caption} again" for caption in table["caption"]]
    pq.write_table(pa.table(table), tmp_path / f"{what}.parquet")
    with pytest.raises(UserError, match="captions or teacher's features than lie there now: put them back"):
        finetune(config, quiet=True)
    shutil.copy(sources / f"{what}.parquet", tmp_path)
    assert finetune(config, quiet=True)["scores"]


def test_an_embedding_that_does_not_train_may_be_tapped_beside_others_but_not_alone(make: Make) -> None:
    lora: dict[str, Any] = {"tune": {"method": "lora", "lora_rank": 4}}
    finetune(make("all", align={"layers": ["all"]}, **lora), quiet=True)
    with pytest.raises(UserError, match="layers 0 have no gradient"):
        finetune(make("first", align={"layers": ["0"]}, **lora), quiet=True)
