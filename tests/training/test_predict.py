"""``predict`` on the folder that a run leaves: one JSON line a file, and a bad file costs its own line only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from crossalign import cli
from crossalign.config import AdaptConfig
from crossalign.data.images.decode import to_pixels
from crossalign.models.classifier.model import ImageClassifier
from crossalign.verbs.adapt.job import adapt
from crossalign.verbs.adapt.predict import _files


def test_predict(
    tiny_run: Callable[..., AdaptConfig],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_run("small-fpt", "loop.epochs=1")
    adapt(config, quiet=True)
    model, images = str(config.output / "model"), tmp_path / "images"
    images.mkdir()
    for i in range(3):
        shutil.copy(pictures / "down" / f"{i}.png", images)
    (images / "broken.png").write_bytes(b"no picture")
    capsys.readouterr()

    assert cli.main(["predict", model, str(images), "--device", "cpu", "--batch-size", "2"]) == 0
    said = capsys.readouterr()
    lines = {Path(line["file"]).name: line for line in map(json.loads, said.out.splitlines())}
    assert lines.keys() == {"0.png", "1.png", "2.png", "broken.png"}
    assert "1 of 4 images could not be read" in said.err and "broken.png" in lines["broken.png"]["error"]
    assert all(lines[f"{i}.png"]["label"] in ("across", "down", "noise") for i in range(3))

    assert cli.main(["predict", model, str(images / "0.png"), "--top-k", "3"]) == 0
    (best,) = map(json.loads, capsys.readouterr().out.splitlines())
    scores = [c["score"] for c in best["classes"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)
    assert best["classes"][0]["label"] == lines["0.png"]["label"]
    assert best["classes"][0]["score"] == pytest.approx(lines["0.png"]["score"], abs=1e-5)  # other batches, other rounding
    from crossalign.models.classifier.model import ImageClassifier

    passes = []
    forward = ImageClassifier.forward
    monkeypatch.setattr(ImageClassifier, "forward", lambda self, images: passes.append(len(images)) or forward(self, images))
    for name, top in (("answers.csv", "2"), ("answers.parquet", "1")):
        file = tmp_path / name
        assert cli.main(["predict", str(config.output), str(images), "--top-k", top, "--output", str(file)]) == 0
        table = (pyarrow.csv.read_csv if name.endswith("csv") else pyarrow.parquet.read_table)(file)
        more = ["label_2", "score_2"] if top == "2" else []
        assert table.column_names == ["file", "label", "score", *more, "error"]
        rows = {Path(row["file"]).name: row for row in table.to_pylist()}
        assert rows.keys() == lines.keys() and "no picture" not in rows["0.png"]["label"]
        assert rows["0.png"]["label"] == lines["0.png"]["label"] and rows["broken.png"]["error"]
    assert passes == [3, 3], "a file that cannot be read costs the others no pass of their own"
    assert not capsys.readouterr().out
    assert cli.main(["predict", str(config.output), str(images), "--output", "answers.xlsx"]) == 2
    assert "--output answers.xlsx is neither a .csv nor a .parquet file" in capsys.readouterr().err


def test_predict_sees_images_as_training_did(
    tiny_run: Callable[..., AdaptConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run("small-fpt", "loop.epochs=1", "data.image_size=8", "data.resize=pad")
    adapt(config, quiet=True)
    wide = np.zeros((8, 40, 3), np.uint8)
    wide[:, :16], wide[:, 24:] = 255, 90
    Image.fromarray(wide).save(tmp_path / "wide.png")
    model = ImageClassifier.from_pretrained(config.output / "model")
    capsys.readouterr()
    assert cli.main(["predict", str(config.output), str(tmp_path / "wide.png"), "--device", "cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)["score"]
    assert answer == pytest.approx(model.predict(tmp_path / "wide.png")[0][0]["score"], rel=1e-6)
    cut = model.predict(to_pixels(tmp_path / "wide.png", (3, 8, 8)))[0][0]["score"]
    assert answer != pytest.approx(cut, rel=1e-4), "the picture shows the difference"


def test_a_folder_gives_the_pictures_that_adapt_would_take(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "inside" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "inside/b.PBM", ".c.png", "inside/.hidden/d.png", "e.txt"):
        shutil.copy(pictures / "down" / "0.png", tmp_path / name)
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    (tmp_path / "inside" / "round").symlink_to(tmp_path)
    faults: dict[Path, str] = {}
    assert [str(file.relative_to(tmp_path)) for file in _files([tmp_path], faults)] == ["a.png", "inside/b.PBM"]
    assert faults == {tmp_path / "nowhere.png": "a link that leads nowhere", tmp_path / "pipe.png": "no regular file"}


@pytest.mark.parametrize(
    ("model", "image", "says"),
    [("/nowhere", "a.png", "no such file or folder: a.png"), ("/nowhere", ".", "no images in the folder")],
)
def test_what_is_not_there_is_one_sentence(
    model: str, image: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", model, image]) == 2
    assert says in capsys.readouterr().err
    assert cli.main(["predict", model]) == 2
    assert "no images: name files or folders" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"")
    assert cli.main(["predict", model, "a.png"]) == 2
    assert "no saved classifier at '/nowhere'" in capsys.readouterr().err
