"""The search over a language model's training: loss chooses, rungs count evaluations, the term goes on over pauses."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from crossalign.config import PretrainConfig, SearchConfig, TrackingConfig, update
from crossalign.report import report
from crossalign.studies.search.jobs import validations
from crossalign.studies.tune import tune
from crossalign.verbs.language_model.job import pretrain

WORDS = "the cat sat on a mat while two red dogs ran over wet grass and birds sang in old trees"
PAIRS = 100
SPACE = "optim.lr: {low: 1.0e-4, high: 3.0e-2, log: true}\nalign.weight: {choices: [1, 10], when: align.metric != none}\n"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of small-pretrain on a text of 17 words, with pictures of one colour whose features are that colour."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(random.choice(WORDS.split(), size=random.integers(4, 9)))

    (folder / "text.txt").write_text("\n".join(sentence() + "." for _ in range(400)))
    images, features = [], []
    for _ in range(PAIRS):
        colour, buffer = random.integers(0, 256, 3), BytesIO()
        Image.new("RGB", (4, 4), tuple(map(int, colour))).save(buffer, "PNG")
        images.append(buffer.getvalue())
        features.append([*(colour / 255).tolist(), *random.normal(size=5).tolist()])
    ids = [f"picture {i}" for i in range(PAIRS)]
    pq.write_table(pa.table({"id": ids, "image": images, "caption": [sentence() for _ in ids]}), folder / "pairs.parquet")
    pq.write_table(pa.table({"id": ids, "features": features}), folder / "features.parquet")
    return (
        f"corpus.source=[{folder / 'text.txt'}]", "corpus.vocabulary=300", "corpus.validation_fraction=0.1", "block=24",
        "gpt.layers=2", "gpt.heads=2", "gpt.width=16", "align.every=3", "align.batch_size=16", "align.max_length=12",
        "align.held_out=8", f"teacher.ref=file:{folder / 'features.parquet'}", f"pairs.source={folder / 'pairs.parquet'}",
        "loop.steps=16", "loop.evaluate_every=4", "loop.batch_size=6", "loop.precision=fp32", "loop.device=cpu",
    )  # fmt: skip


@pytest.mark.usefixtures("here")
def test_the_loss_at_the_end_of_a_rung_chooses(tmp_path: Path, settings: tuple[str, ...]) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    config = SearchConfig(
        recipe="small-pretrain", trials=6, rungs=3, seeds=2, output=tmp_path / "found", space=str(space), set=settings,
        keep_checkpoints=True, tracking=TrackingConfig(mlflow=False),
    )  # fmt: skip
    assert tune(config) == []
    found = json.loads((config.output / "search.json").read_text())
    assert found["rungs"] == [1, 2, 4] and found["unit"] == "evaluation" and not found["larger_is_better"]
    for trial in found["trials"]:  # the loss at the rung's end, not the best one before
        at_the_end = [trial["curve"][int(rung["epochs"]) - 1] for rung in trial["rungs"]]
        assert [rung["score"] for rung in trial["rungs"]] == at_the_end
        assert set(trial["settings"]) == {"optim.lr", "align.weight"}
    last = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert found["winner"] == min(last, key=lambda trial: trial["curve"][-1])["number"]
    results = [json.loads(path.read_text()) for path in sorted(config.output.glob("winner/*/result.json"))]
    assert [result["seed"] for result in results] == [1, 2]

    straight = update(PretrainConfig(), yaml.safe_load((config.output / "winner.yaml").read_text()))
    straight.output = tmp_path / "straight"
    pretrain(straight, quiet=True)  # at once what the search trained by rungs, term and all
    there = config.output / "trials" / f"{found['winner']:04d}"
    timeless = [[row | {"seconds": 0} for row in validations(folder)] for folder in (there, straight.output)]
    assert timeless[0] == timeless[1]
    assert [row["loss"] for row in validations(straight.output)] == found["trials"][found["winner"]]["curve"]

    page = report([config.output], html=tmp_path / "page.html").read_text()
    assert f"{found['trials'][found['winner']]['curve'][-1]:.4f}" in page and "evaluation" in page
    assert "validation loss" in page and "test accuracy" not in page
