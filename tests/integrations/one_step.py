"""One training step in somebody's trainer, with the term and without it: the difference of the gradients is the term's.

    one_step.main([ENGINE, "--accumulation", "4", "--spread", "ddp", "--compile", "--checkpointing", "plain", "--out", FILE])

Called in one process, or in two that know of each other as under torchrun. The tensors of FILE are the gradients' differences.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossalign.cli import leave_group
from crossalign.data.pairs.batches import PairBatches
from crossalign.features.regularizer import AlignmentRegularizer

ROWS, LENGTH, VOCABULARY = 8, 12, 40
Gradients = dict[str, Tensor]
RATIOS: list[float] = []
"""Of the term's gradient to the whole one, as Trainer logged it."""


class Words:
    """A tokenizer of words that are numbers."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def make_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    config.use_cache = False
    return GPT2LMHeadModel(config)


def make_pairs(batch_size: int = 16) -> PairBatches:
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (24,), generator=random).tolist()
    texts = [" ".join(map(str, torch.randint(1, VOCABULARY, (n,), generator=random).tolist())) for n in lengths]
    return PairBatches(texts, torch.randn(24, 6, generator=random), Words(), batch_size=batch_size)


def make_regularizer(weight: float) -> AlignmentRegularizer:
    return AlignmentRegularizer("cka-linear", weight=weight, every=20, pairs=make_pairs())


def rows() -> Tensor:
    return torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))


def grads(model: Any) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.detach()
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.").replace("_orig_mod.", "")] = gradient.clone()
    return found


def plain(weight: float, options: Any) -> Gradients:
    """The loop of the documentation."""
    from crossalign.training.sharding import shard

    model = make_model().train()
    regularizer = make_regularizer(weight)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    step: Any = torch.compile(model, backend="aot_eager") if options.compile else model
    if options.spread == "ddp":
        step = torch.nn.parallel.DistributedDataParallel(step)
    elif options.spread == "fsdp":
        shard(model, torch.device("cpu"))
    parts = rows()[rank::world].chunk(options.accumulation)
    for i, ids in enumerate(parts):
        last = i == len(parts) - 1
        with nullcontext() if last or options.spread != "ddp" else step.no_sync():
            loss = step(input_ids=ids, labels=ids).loss / len(parts)
            if last and regularizer.due(0):
                loss = loss + regularizer.loss(step)
            loss.backward()
    return grads(model)


def arguments(options: Any, **more: Any) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1,
        "per_device_train_batch_size": ROWS // world // options.accumulation,
        "gradient_accumulation_steps": options.accumulation,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": bool(options.checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": options.checkpointing == "reentrant"},
        "torch_compile": options.compile,
        "torch_compile_backend": "aot_eager" if options.compile else None,
        "use_cpu": True,
        "ddp_backend": "gloo" if world > 1 else None,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        **more,
    }


def capture() -> Any:
    from transformers import TrainerCallback

    class Capture(TrainerCallback):  # type: ignore[misc]
        """Keeps the gradients that the optimiser is given."""

        def __init__(self) -> None:
            self.found: Gradients = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.found = grads(model)

    return Capture()


def trainer(weight: float, options: Any) -> Gradients:
    from transformers import Trainer, TrainingArguments

    from crossalign.integrations.hf_trainer import AlignedTrainerMixin, AlignmentCallback

    class Aligned(AlignedTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    kept = capture()
    data = [{"input_ids": row, "labels": row} for row in rows()]
    settings: dict[str, Any] = {"model": make_model(), "args": TrainingArguments(**arguments(options)), "train_dataset": data}
    if options.mixin:
        made = Aligned(**settings, regularizer=make_regularizer(weight), callbacks=[kept])
    else:
        made = Trainer(**settings, callbacks=[AlignmentCallback(make_regularizer(weight)), kept])
    made.train()
    RATIOS.extend(row["align_grad_ratio"] for row in made.state.log_history if "align_grad_ratio" in row)
    return kept.found


def sft(weight: float, options: Any) -> Gradients:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from crossalign.data.text.tokenizer import train_tokenizer
    from crossalign.integrations.hf_trainer import AlignedTrainerMixin, AlignmentCallback

    class Aligned(AlignedTrainerMixin, SFTTrainer):  # type: ignore[misc]
        pass

    tokenizer = train_tokenizer(["some words"], 257)
    tokenizer.pad_token = tokenizer.eos_token
    kept = capture()
    data = Dataset.from_dict({"input_ids": rows().tolist()})
    args = SFTConfig(**arguments(options, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False))
    settings: dict[str, Any] = {"model": make_model(), "args": args, "train_dataset": data, "processing_class": tokenizer}
    if options.mixin:
        Aligned(**settings, regularizer=make_regularizer(weight), callbacks=[kept]).train()
    else:
        SFTTrainer(**settings, callbacks=[AlignmentCallback(make_regularizer(weight)), kept]).train()
    return kept.found


def lightning(weight: float, options: Any) -> Gradients:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    from crossalign.integrations.lightning import LightningAlignmentCallback as AlignmentCallback

    found: Gradients = {}

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            if options.checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": options.checkpointing == "reentrant"})
            if options.compile:
                self.model.compile(backend="aot_eager")

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    class Capture(pl.Callback):  # type: ignore[misc]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.update(grads(module.model))

    world = int(os.environ.get("WORLD_SIZE", "1"))
    loader = torch.utils.data.DataLoader(rows(), batch_size=ROWS // world // options.accumulation)  # type: ignore[arg-type]
    pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
        accumulate_grad_batches=options.accumulation,
        callbacks=[AlignmentCallback(make_regularizer(weight)), Capture()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    ).fit(Module(), loader)
    return found


ENGINES: dict[str, Callable[[float, Any], Gradients]] = {"plain": plain, "trainer": trainer, "sft": sft, "lightning": lightning}


def norm(gradients: Gradients, without: Gradients) -> float:
    """Of the difference of two sets of gradients."""
    return float(torch.stack([(g - without.get(name, torch.zeros(()))).norm() for name, g in gradients.items()]).norm())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--spread", choices=["one", "ddp", "fsdp"], default="one")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", choices=["", "plain", "reentrant"], default="")
    parser.add_argument("--mixin", action="store_true")
    parser.add_argument("--out", required=True)
    options = parser.parse_args(argv)
    run = ENGINES[options.engine]
    with_term, without = run(10.0, options), run(0.0, options)
    assert with_term.keys() == without.keys()
    term, whole = (norm(with_term, part) for part in (without, {}))
    for ratio in RATIOS:
        assert abs(ratio - term / whole) < 1e-3 * term / whole, (ratio, term / whole)
    if int(os.environ.get("RANK", "0")) == 0:
        save_file({name: (with_term[name] - without[name]).contiguous() for name in without}, options.out)
    leave_group(0)
