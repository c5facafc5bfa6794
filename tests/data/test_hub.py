"""References to the hub, opened as a user writes them, with the hub's own interface on loopback: no test goes further."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub
from PIL import Image

OPEN = """
import json, sys
from crossalign.config import DataConfig, PairsConfig
from crossalign.core.errors import UserError
from crossalign.data.images.load import open_images
from crossalign.data.pairs.load import open_pairs
from crossalign.data.text.tokenizer import open_tokenizer
from crossalign.models.language.model import open_language_model
from crossalign.models.vision.teacher import open_teacher

def parts(splits):
    return [splits.train, splits.validation, splits.test]

DOORS = {
    "language": lambda ref: open_language_model(ref, head="causal").fingerprint,
    "tokenizer": lambda ref: len(open_tokenizer(ref)),
    "teacher": lambda ref: open_teacher(ref).fingerprint,
    "images": lambda ref: sum(map(len, parts(open_images(DataConfig(source=ref, image_size=8))))),
    "pairs": lambda ref: [list(texts) for texts in open_pairs(PairsConfig(source=ref, split="train")).texts],
}
answers = []
for door, ref in json.loads(sys.argv[1]):
    try:
        answers.append(DOORS[door](ref))
    except UserError as error:
        answers.append(f"UserError: {error}")
print("ANSWERS" + json.dumps(answers))
"""
Ask = Callable[..., list[Any]]


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A language model of two revisions, two vision models, images and captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import timm
    import torch
    import transformers

    from crossalign.data.text.tokenizer import train_tokenizer

    hub = Hub(tmp_path_factory.mktemp("hub"))
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300)
    for revision in ("main", "v1"):
        folder = hub.page("models", "lab/tiny-gpt") / revision
        config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=32)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name in ("lab/gated", "lab/cut"):
        transformers.GPT2LMHeadModel(config).save_pretrained(hub.page("models", name) / "main")
    hub.gated = {"lab/gated", "lab/gated-set"}
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    folder = hub.page("models", "lab/tiny-vit") / "main"
    transformers.ViTModel(vit).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    model = timm.create_model("test_vit", pretrained=False)
    for name in ("lab/timm-vit", "timm/test_vit.r160_in1k"):
        timm.models.save_for_hf(model, str(hub.page("models", name) / "main"), safe_serialization="both")
        (hub.page("models", name) / "main" / "pytorch_model.bin").unlink()
    rng = np.random.default_rng(0)
    for name, column, cells in (
        ("lab/pictures", "label", ["cat", "dog"] * 20),
        ("lab/captions", "caption", [f"a thing {i}" for i in range(40)]),
        ("lab/gated-set", "label", ["cat", "dog"]),
    ):
        (hub.page("datasets", name) / "main" / "data").mkdir(parents=True)
        images = [{"bytes": png(rng), "path": None} for _ in cells]
        table = pa.table({"image": images, column: cells})
        pq.write_table(table, hub.page("datasets", name) / "main" / "data" / "train-00000-of-00001.parquet")
    with hub.serving():
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Open references in a process of its own, for the client reads the hub's address when it is imported."""

    def ask(*questions: tuple[str, str], endpoint: str = hub.url, offline: bool = False) -> list[Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"CROSSALIGN_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        call = [sys.executable, "-c", OPEN, json.dumps(questions)]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout.rpartition("ANSWERS")[2])  # type: ignore[no-any-return]

    return ask


WHOLE = [
    ("language", "hf:lab/tiny-gpt"),
    ("language", "hf:lab/tiny-gpt@v1"),
    ("tokenizer", "hf:lab/tiny-gpt"),
    ("teacher", "hf:lab/tiny-vit"),
    ("teacher", "hf:lab/timm-vit"),
    ("teacher", "timm:test_vit.r160_in1k"),
    ("images", "hf:lab/pictures"),
    ("images", "hf:lab/pictures@main"),
    ("pairs", "hf:lab/captions"),
]
WRONG = [
    ("language", "hf:lab/gated", "'hf:lab/gated' is gated: ask for access on its page, then log in with 'hf auth login'"),
    ("teacher", "hf:lab/gated", "'hf:lab/gated' is gated"),
    ("images", "hf:lab/gated-set", "gated"),
    ("language", "hf:lab/missing", "'hf:lab/missing' is not on the hub, or is private"),
    ("teacher", "hf:lab/missing", "'hf:lab/missing' is not on the hub, or is private"),
    ("images", "hf:lab/missing", "cannot open hf:lab/missing"),
    ("pairs", "hf:lab/missing", "cannot open hf:lab/missing"),
    ("language", "hf:lab/tiny-gpt@v9", "'hf:lab/tiny-gpt@v9' has no revision of that name"),
    ("language", "hf:a/b/c", "is not a hub model's name: write hf:ORG/NAME"),
]


def test_references_open_and_a_second_time_from_the_cache(hub: Hub, ask: Ask) -> None:
    first = ask(*WHOLE)
    assert not [answer for answer in first if str(answer).startswith("UserError")]
    assert first[0] != first[1]  # two revisions
    assert first[2] > 256  # every byte, and the separator
    assert first[6] == first[7] == 40
    assert len(first[8]) > 20 and all(text.startswith("a thing ") for (text,) in first[8])
    asked = len(hub.asked)
    assert ask(*WHOLE, offline=True) == first
    assert len(hub.asked) == asked


@pytest.mark.slow  # the client tries again and again
def test_references_open_from_the_cache_when_the_hub_is_gone(ask: Ask) -> None:
    assert ask(*WHOLE) == ask(*WHOLE, endpoint="http://127.0.0.1:9")


def test_what_cannot_be_fetched_is_one_sentence(ask: Ask) -> None:
    for answer, (_, ref, sentence) in zip(ask(*[(door, ref) for door, ref, _ in WRONG]), WRONG, strict=True):
        assert str(answer).startswith("UserError") and sentence in answer and "\n" not in answer, (ref, answer)


def test_what_is_not_at_hand_offline_is_one_sentence(ask: Ask) -> None:
    for answer in ask(*WHOLE, offline=True):
        assert str(answer).startswith("UserError") and "\n" not in answer and "check the name and the network" in answer


def test_a_download_that_breaks_off_goes_on(hub: Hub, ask: Ask) -> None:
    hub.cut.add("model.safetensors")
    (answer,) = ask(("language", "hf:lab/cut"))
    assert not str(answer).startswith("UserError") and not hub.cut
    asked = [path for method, path, _ in hub.asked if method == "GET" and path.startswith("/lab/cut/resolve/")]
    assert len(asked) == len(set(asked)) + 1  # that file alone, once more
