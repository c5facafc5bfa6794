"""Features of a teacher, written once: resumable after a kill, and never used for other data or another teacher."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from crossalign import cli
from crossalign.config import PairsConfig, TeacherConfig
from crossalign.core.errors import UserError
from crossalign.data.pairs.load import Pairs, open_pairs
from crossalign.features import store as module
from crossalign.features.sources import ImageSource, live_features, teacher_features
from crossalign.features.store import FeatureStore, read_metadata
from crossalign.models.vision.teacher import Teacher, open_teacher
from crossalign.verbs.features import FeaturesArgs, features

timm = pytest.importorskip("timm", reason="needs timm")
COUNT = 20


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(path: Path, seed: int = 0, count: int = COUNT) -> PairsConfig:
    columns = {"image": [picture(seed + i) for i in range(count)], "caption": [f"text {i}" for i in range(count)]}
    pq.write_table(pa.table({"id": [f"p{i}" for i in range(count)], **columns}), path)
    return PairsConfig(source=str(path))


@pytest.fixture
def config(tmp_path: Path) -> PairsConfig:
    return write_pairs(tmp_path / "train.parquet")


@pytest.fixture
def pairs(config: PairsConfig) -> Pairs:
    return open_pairs(config)


@pytest.fixture
def teacher(tmp_path: Path) -> TeacherConfig:
    sizes = {"img_size": 28, "depth": 2, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", **sizes)
    timm.models.save_for_hf(model, tmp_path / "vit", model_args=sizes, safe_serialization=True)
    return TeacherConfig(ref=str(tmp_path / "vit"), layers=("1", "penultimate"), batch_size=4)


def test_a_file_holds_the_teachers_features_in_the_pairs_order(
    teacher: TeacherConfig, config: PairsConfig, pairs: Pairs
) -> None:
    path = features(FeaturesArgs(teacher=teacher, pairs=config))
    model = open_teacher(teacher.ref, settings=teacher)
    values = FeatureStore(pairs).load(path, model.key).values
    assert values.shape == (COUNT, 32) and values.dtype == torch.float32
    expected = model(model.preprocess([Image.open(io.BytesIO(picture(i))) for i in range(COUNT)]))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(live_features(model, pairs)(torch.tensor([7, 3])).argmax(1), values[[7, 3]].argmax(1))
    told = read_metadata(path)
    assert (told["layers"], told["widths"], told["teacher"]) == ('["1", "penultimate"]', "[16, 16]", teacher.ref)
    assert told["pairs_fingerprint"] == pairs.fingerprint and '"input_size": [3, 28, 28]' in told["transform"]


def test_the_batch_size_does_not_change_them(teacher: TeacherConfig, pairs: Pairs, tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 64):
        teacher.batch_size = size
        path = FeatureStore(pairs).write(ImageSource(teacher), tmp_path / f"{size}.safetensors")
        found.append(FeatureStore(pairs).load(path).values)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_a_second_call_computes_nothing(teacher: TeacherConfig, pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FeatureStore(pairs).write(ImageSource(teacher))
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(Teacher, "forward", lambda *_: pytest.fail("computed again"))
    assert FeatureStore(pairs).write(ImageSource(teacher)) == path and path.stat().st_mtime_ns == before
    found = teacher_features(teacher, pairs)
    assert len(found.values) == COUNT and found.key == open_teacher(teacher.ref, settings=teacher, weights=False).key
    assert not list(path.parent.glob(f".{path.name}*.parts"))  # others in the cache may be those of killed passes


@pytest.mark.parametrize("content", [b"", b"half", b"\x80garbage" * 50], ids=["emptied", "halved", "garbage"])
def test_damaged_features_in_the_cache_are_made_again(teacher: TeacherConfig, pairs: Pairs, content: bytes) -> None:
    path = FeatureStore(pairs).write(ImageSource(teacher))
    whole, values = path.read_bytes(), FeatureStore(pairs).load(path).values.clone()  # from the map of the file
    path.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert FeatureStore(pairs).write(ImageSource(teacher)) == path and torch.equal(
        FeatureStore(pairs).load(path).values, values
    )


def test_controls_are_deterministic_in_their_seed(teacher: TeacherConfig, pairs: Pairs, tmp_path: Path) -> None:
    teacher.ref = f"random:{teacher.ref}"
    three, four = replace(teacher, seed=3), replace(teacher, seed=4)
    made = [
        FeatureStore(pairs).write(ImageSource(one), tmp_path / f"{i}.safetensors") for i, one in enumerate((three, three, four))
    ]
    a, b, c = (FeatureStore(pairs).load(path).values for path in made)
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)
    with pytest.raises(UserError, match=r"of another teacher or of other settings .*seed 4"):
        FeatureStore(pairs).write(ImageSource(three), made[2])
    assert len({FeatureStore(pairs).write(ImageSource(one)) for one in (three, four)}) == 2


def slow(teacher: TeacherConfig, pairs: PairsConfig, output: Path) -> None:
    forward = Teacher.forward

    def late(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        if len(list(output.parent.glob(f".{output.name}.*.parts/[0-9]*.safetensors"))) >= 2:
            time.sleep(100)  # for the kill
        return forward(self, pixels)

    Teacher.forward = late  # type: ignore[method-assign]
    with contextlib.redirect_stderr(None):
        features(FeaturesArgs(output, teacher=teacher, pairs=pairs))


def test_a_killed_run_goes_on(
    teacher: TeacherConfig, config: PairsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    whole = features(FeaturesArgs(tmp_path / "whole.safetensors", teacher=teacher, pairs=config))
    output = tmp_path / "killed.safetensors"
    child = multiprocessing.get_context("fork").Process(target=slow, args=(teacher, config, output), daemon=True)  # type: ignore[attr-defined]
    child.start()
    for _ in range(600):
        done = list(tmp_path.glob(".killed.safetensors.*.parts/[0-9]*.safetensors"))
        if len(done) >= 2:
            break
        time.sleep(0.02)
    os.kill(child.pid or 0, 9)
    child.join()
    assert len(done) == 2 and not output.exists()
    computed = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, pixels: computed.append(len(pixels)) or forward(self, pixels))
    assert features(FeaturesArgs(output, teacher=teacher, pairs=config)) == output
    assert sum(n for n in computed) <= COUNT - 2 * 4
    pairs = open_pairs(config)
    assert torch.equal(FeatureStore(pairs).load(output).values, FeatureStore(pairs).load(whole).values)
    assert not list(tmp_path.glob(".killed*"))


def test_features_of_others_are_refused(teacher: TeacherConfig, pairs: Pairs, tmp_path: Path) -> None:
    path = FeatureStore(pairs).write(ImageSource(teacher), tmp_path / "mine.safetensors")
    other = open_pairs(write_pairs(tmp_path / "other-train.parquet", seed=100))
    key = open_teacher(teacher.ref, settings=teacher).key
    with pytest.raises(
        UserError, match=r"mine.safetensors' holds features of other pairs \(train.parquet: .* not of other-train"
    ):
        FeatureStore(other).load(path, key)
    with pytest.raises(UserError, match="of other pairs"):
        FeatureStore(other).write(ImageSource(teacher), path)
    teacher.pool = "mean"
    with pytest.raises(UserError, match=r"of another teacher or of other settings \(.*layers 1, penultimate, pool auto"):
        FeatureStore(pairs).write(ImageSource(teacher), path)
    assert len(FeatureStore(pairs).load(path).values) == COUNT
    save_file({"features": torch.zeros(COUNT, 2)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="is no features file of `crossalign features`"):
        FeatureStore(pairs).load(tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        FeatureStore(pairs).load(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="there is no features file"):
        FeatureStore(pairs).load(tmp_path / "none.safetensors")


def test_features_that_are_no_numbers_are_refused(
    teacher: TeacherConfig, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Teacher.forward

    def broken(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        values = forward(self, pixels)
        values[min(1, len(values) - 1), 0] = torch.nan
        return values

    monkeypatch.setattr(Teacher, "forward", broken)
    with pytest.raises(UserError, match="gives features of p1 that are no finite numbers"):
        FeatureStore(pairs).write(ImageSource(teacher), tmp_path / "new.safetensors")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_features_of_ones_own(tmp_path: Path, pairs: Pairs, suffix: str) -> None:
    values = np.random.default_rng(0).normal(size=(COUNT, 5))
    path = tmp_path / f"mine{suffix}"

    def write(rows: np.ndarray) -> None:
        if suffix == ".npy":
            np.save(path, rows)
        elif suffix == ".safetensors":
            save_file({"features": torch.from_numpy(rows)}, path)
        else:
            pq.write_table(pa.table({"features": rows.tolist()}), path)

    own = TeacherConfig(ref=f"file:{path}")
    write(values)
    found = teacher_features(own, pairs)
    assert found.values.dtype == torch.float32 and np.allclose(found.values.numpy(), values, atol=1e-6) and found.key
    write(values[1:])
    with pytest.raises(UserError, match=f"has {COUNT - 1} rows for {COUNT} pairs"):
        teacher_features(own, pairs)
    values[4, 2] = np.nan
    write(values)
    with pytest.raises(UserError, match="first for p4"):
        teacher_features(own, pairs)


def test_an_array_in_fp32_is_read_without_a_warning(tmp_path: Path, pairs: Pairs) -> None:
    values = np.random.default_rng(0).normal(size=(COUNT, 5)).astype(np.float32)
    np.save(tmp_path / "mine.npy", values)
    given = f"Path({str(tmp_path / 'mine.npy')!r}), {pairs.ids!r}"
    code = f"from pathlib import Path; from crossalign.features.store import read_features_file as read; read({given})"
    # Torch warns once a process.
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_features_of_ones_own_by_id(tmp_path: Path, pairs: Pairs) -> None:
    values = np.random.default_rng(0).normal(size=(COUNT + 5, 3))
    order = np.random.default_rng(1).permutation(COUNT + 5)
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"id": [f"p{i}" for i in order], "embedding": values[order].tolist()}), path)
    found = teacher_features(TeacherConfig(ref=f"file:{path}"), pairs).values
    assert np.allclose(found.numpy(), values[:COUNT], atol=1e-6)
    pq.write_table(pa.table({"id": [f"p{i}" for i in range(COUNT - 2)], "embedding": values[: COUNT - 2].tolist()}), path)
    with pytest.raises(UserError, match="has no features of 2 of 20 pairs, such as p18, p19"):
        teacher_features(TeacherConfig(ref=f"file:{path}"), pairs)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", b"x", "cannot read features from"),
        ("a.txt", b"x", "unknown kind of features file '.txt'"),
        ("a.parquet", b"x", "cannot read features from"),
        ("a.safetensors", b"x", "cannot read features from"),
        ("b.npy", None, "there is no file of features"),
    ],
)
def test_bad_files_of_ones_own(tmp_path: Path, pairs: Pairs, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        teacher_features(TeacherConfig(ref=f"file:{tmp_path / name}"), pairs)


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    code = cli.main(["features", *args])
    return code, capsys.readouterr()


def test_the_verb(capsys: pytest.CaptureFixture[str], teacher: TeacherConfig, config: PairsConfig, tmp_path: Path) -> None:
    output = tmp_path / "out" / "features.safetensors"
    args = ["--teacher.ref", teacher.ref, "--pairs.source", config.source, "--teacher.layers", "all"]
    code, said = command(capsys, *args, "--output", str(output))
    assert code == 0 and said.out.startswith(f"{output}: {teacher.ref}, layers 1 2; train.parquet: 20 images with 20 texts")
    assert FeatureStore(open_pairs(config)).load(output).values.shape == (COUNT, 32)
    for more, says in (
        (["--output", str(tmp_path / "x.npy")], "must end in .safetensors"),
        (["--teacher.layers", "9"], "there is no layer 9: the teacher has the layers 0 to 2"),
        (["--teacher.batch-size", "0"], "--teacher.batch-size is 0"),
        (["--teacher.ref", f"file:{output}"], "holds features already"),
        (["--pairs.source", "nowhere"], "pair source 'nowhere' does not exist"),
        (["--device", "mps"], "is not on this machine"),
    ):
        if more[0] == "--device" and torch.backends.mps.is_available():
            continue
        code, said = command(capsys, *args, *more)
        assert code == 2 and says in said.err and said.err.count("\n") == 1
