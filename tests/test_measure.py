"""The verb measure: a folder with scores, figures and a page, from features that are computed once; bad input in a sentence."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossalign import cli, language_features, measure
from crossalign import features as features_module
from crossalign.alignment import cka
from crossalign.config import MeasureConfig, PairsConfig, PretrainConfig, update
from crossalign.data.pairs import open_pairs
from crossalign.errors import UserError
from crossalign.features import load_features, read_metadata
from crossalign.language_features import Reading, bits_per_byte, reading_key, write_text_features
from crossalign.models.language import LanguageModel, open_language_model
from crossalign.models.taps import Taps
from crossalign.pretrain import pretrain
from crossalign.report.runs import open_study

pytest.importorskip("matplotlib", reason="needs matplotlib")
timm = pytest.importorskip("timm", reason="needs timm")
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "white": (250, 250, 250), "black": (5, 5, 5)}
COUNT = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one colour with captions that name it, features that know it, a text, and a tiny vision model."""
    folder = tmp_path_factory.mktemp("measure")
    random = np.random.default_rng(0)
    images, captions, values = [], [], []
    for i in range(COUNT):
        name = list(COLOURS)[i % len(COLOURS)]
        colour = np.clip(np.array(COLOURS[name]) + random.integers(-9, 9, 3), 0, 255)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), tuple(map(int, colour))).save(buffer, "PNG")
        images.append(buffer.getvalue())
        captions.append([f"{name} {name} {random.choice(['wall', 'field', 'door'])}", f"{name} it is"])
        values.append([*(colour / 255).tolist(), *random.normal(scale=0.1, size=4).tolist()])
    ids = [f"p{i}" for i in range(COUNT)]
    pq.write_table(pa.table({"id": ids, "image": images, "captions": captions}), folder / "test.parquet")
    pq.write_table(pa.table({"id": ids, "features": values}), folder / "features.parquet")
    sentences = [f"a {random.choice(list(COLOURS))} {random.choice(['wall', 'door'])} and a sky." for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(sentences))
    sizes = {"img_size": 28, "depth": 2, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model("vit_small_patch14_dinov2", **sizes), folder / "vit", model_args=sizes, safe_serialization=True
    )
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A training run that kept three models."""
    values: dict[str, Any] = {
        "block": 24,
        "output": str(place / "run"),
        "corpus": {"source": [str(place / "text.txt")], "vocabulary": 300, "validation_fraction": 0.1},
        "gpt": {"layers": 2, "heads": 2, "width": 16},
        "optim": {"lr": 1e-2},
        "loop": {"steps": 8, "evaluate_every": 4, "batch_size": 6, "keep_every": 4, "precision": "fp32", "device": "cpu"},
        "tracking": {"mlflow": False},
    }
    pretrain(update(PretrainConfig(), values), quiet=True)
    return place / "run"


@pytest.fixture
def config(place: Path, run: Path, tmp_path: Path) -> MeasureConfig:
    return MeasureConfig(
        language=(str(run / "model"),),
        vision=(f"file:{place / 'features.parquet'}",),
        permutations=39,
        groups=10,
        max_length=20,
        device="cpu",
        output=tmp_path / "measured",
        pairs=PairsConfig(source=str(place / "test.parquet"), split="test"),
    )


def tapped(opened: LanguageModel, text: str, layer: int | str) -> torch.Tensor:
    """A layer's feature (1, D) of a text alone."""
    ids = torch.tensor([opened.tokenizer(text)["input_ids"][:24]])
    with torch.no_grad():
        return Taps(layer)(opened.model, ids, torch.ones_like(ids))


def test_a_measurement_is_a_folder_that_says_what_was_found(config: MeasureConfig, place: Path, run: Path) -> None:
    config = replace(config, vision=(*config.vision, str(place / "vit")), twins=True, text=str(place / "text.txt"), block=16)
    result = measure(config)
    assert [model["name"] for model in result["language"]] == ["model", "random model"]
    assert [model["name"] for model in result["vision"]] == ["features.parquet", "vit", "random vit"]
    assert result["vision"][1]["layers"] == ["1", "2", "penultimate"] and result["language"][0]["layers"] == ["0", "1", "2"]
    assert result == json.loads((config.output / "measure.json").read_text())
    best = result["alignment"][0]
    scores = load_file(config.output / "scores.safetensors")
    held = scores["model | features.parquet | score"]
    assert held.shape == (3, 1) and best["score"] == pytest.approx(float(held.max()))
    assert best["p"] == pytest.approx(1 / 40) and best["interval"][0] < best["score"] < best["interval"][1]
    assert 0 < best["calibrated"] < 1 and best["critical"] < best["score"]
    assert scores["random model | vit | p"].shape == (3, 3) and len(scores["model | vit | null best"]) == 39
    assert result["language"][0]["bits_per_byte"] < result["language"][1]["bits_per_byte"]
    page = (config.output / "measure.md").read_text()
    for name in ("heat-maps", "against-chance", "quality"):
        assert f"figures/{name}.png" in page and Image.open(config.output / "figures" / f"{name}.png").width > 300
    assert (config.output / "config.yaml").is_file() and (config.output / "environment.json").is_file()
    with pytest.raises(UserError, match="no run in"):  # nor is it an unfinished run in a report
        open_study([config.output.parent])


def test_scores_are_the_metric_of_the_layers(config: MeasureConfig, place: Path) -> None:
    measure(config)
    opened = open_language_model(config.language[0])
    pairs = open_pairs(config.pairs)
    layer = torch.cat([tapped(opened, texts[0], 1) for texts in pairs.texts])
    seen = torch.tensor(pq.read_table(place / "features.parquet")["features"].to_pylist())
    found = load_file(config.output / "scores.safetensors")["model | features.parquet | score"]
    assert float(found[1, 0]) == pytest.approx(float(cka(layer, seen, debiased=True)), abs=1e-4)


def test_a_second_call_opens_no_model(config: MeasureConfig, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, vision=(str(place / "vit"),), text=str(place / "text.txt"), block=16)
    first = measure(config)
    monkeypatch.setattr(language_features, "open_language_model", lambda *_, **__: pytest.fail("opened again"))
    monkeypatch.setattr(features_module, "_compute", lambda *_: pytest.fail("computed again"))
    assert measure(config) == first


def test_adding_a_model_costs_one_pass_of_that_model(config: MeasureConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(config)
    opened: list[str] = []
    real = open_language_model

    def counted(ref: str, **settings: Any) -> Any:
        opened.append(ref)
        return real(ref, **settings)

    monkeypatch.setattr(language_features, "open_language_model", counted)
    added = f"shuffled:{config.language[0]}"
    measure(replace(config, language=(*config.language, added), output=config.output.with_name("more")))
    assert opened == [added]


def test_a_runs_models_are_measured_over_its_steps(config: MeasureConfig, run: Path) -> None:
    result = measure(replace(config, language=(str(run),)))
    assert [model["step"] for model in result["language"]] == [0, 4, 8]
    assert [model["name"] for model in result["language"]] == ["run, step 0", "run, step 4", "run, step 8"]
    assert Image.open(config.output / "figures" / "dynamics.png").width > 300
    last = load_file(config.output / "scores.safetensors")["run, step 8 | features.parquet | score"]
    measure(replace(config, output=config.output.with_name("alone")))
    alone = load_file(config.output.with_name("alone") / "scores.safetensors")["model | features.parquet | score"]
    assert torch.allclose(last, alone, atol=1e-6)  # the last model kept is the run's


@pytest.mark.parametrize("metric", ["mutual-knn", "cka-rbf", "dot-product"])
def test_any_similarity_measures(config: MeasureConfig, metric: str) -> None:
    result = measure(replace(config, metric=metric, neighbours=5))
    assert -1 <= result["alignment"][0]["score"] <= 1


def test_captions_are_the_first_the_mean_or_all_in_one(config: MeasureConfig) -> None:
    pairs, ref = open_pairs(config.pairs), config.language[0]
    found = {
        captions: load_features(write_text_features(ref, Reading(("last",), "mean", captions, 24), pairs), pairs)  # type: ignore[arg-type]
        for captions in ("first", "mean", "all")
    }
    opened = open_language_model(ref)

    one, two = pairs.texts[0]
    first, second, both = (tapped(opened, text, "last") for text in (one, two, f"{one} {two}"))
    for captions, expected in (("first", first), ("mean", (first + second) / 2), ("all", both)):
        torch.testing.assert_close(found[captions][:1], expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_text_do_not_depend_on_the_batch(config: MeasureConfig) -> None:
    pairs = open_pairs(config.pairs)
    reading = Reading(pool="last", max_length=24)
    path = write_text_features(config.language[0], reading, pairs)
    whole = load_features(path, pairs, reading_key(config.language[0], reading))
    assert read_metadata(path)["widths"] == "[16, 16, 16]" and whole.shape == (COUNT, 48)
    path.unlink()
    alone = load_features(write_text_features(config.language[0], replace(reading, batch_size=1), pairs), pairs)
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)


def test_bits_a_byte_do_not_depend_on_the_batch_and_count_the_bytes(run: Path, place: Path) -> None:
    text, ref = (place / "text.txt").read_text()[:300], str(run / "model")
    opened = open_language_model(ref, head="causal")
    tokens = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
    separator = opened.tokenizer.bos_token_id
    stream, nats = [separator, *tokens, separator], 0.0
    for start in range(0, len(stream) - 1, 24):
        ids, targets = torch.tensor([stream[start : start + 24]]), torch.tensor(stream[start + 1 : start + 25])
        with torch.no_grad():
            likely = opened.model(ids[:, : len(targets)]).logits[0].log_softmax(-1)
        nats -= float(likely.gather(1, targets[:, None]).sum())
    expected = nats / np.log(2) / len(text.encode())
    assert bits_per_byte(ref, text, block=500, batch_size=3) == pytest.approx(expected, rel=1e-4)


def test_other_pairs_do_not_use_the_features(config: MeasureConfig, place: Path) -> None:
    few = replace(config.pairs, limit=30)
    measure(replace(config, vision=(str(place / "vit"),)))
    again = measure(replace(config, vision=(str(place / "vit"),), pairs=few, output=config.output.with_name("few")))
    assert again["n"] == 30


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no language model": ({"language": ()}, "--language names no model"),
    "no such model": ({"language": ("nowhere",)}, "no model folder at 'nowhere'"),
    "no such package": ({"language": ("package:minilmo",)}, "did you mean 'minilm'"),
    "no text model": ({"language": ("none:package:minilm",)}, "reads no text"),
    "no such vision model": ({"vision": ("package:mobilnet",)}, "unknown teacher package"),
    "no such layer": ({"language_layers": ("9",)}, "there is no layer 9"),
    "no such metric": ({"metric": "cka-lineal"}, "unknown metric 'cka-lineal'; did you mean 'cka-linear'"),
    "no neighbours": ({"metric": "mutual-knn", "neighbours": 0}, "--neighbours is 0"),
    "too many neighbours": ({"metric": "mutual-knn", "neighbours": 60}, "60 pairs are too few for --metric mutual-knn"),
    "no permutation": ({"permutations": 0}, "--permutations 0 cannot show anything at --level 0.05: take 19 or more"),
    "one group": ({"groups": 1}, "--groups is 1"),
    "no level": ({"level": 0.0}, "--level is 0.0"),
    "long texts": ({"max_length": 500}, "sees 24 tokens: lower --max-length 500"),
    "no text": ({"text": "nowhere.txt"}, "cannot read the text 'nowhere.txt'"),
    "named twice": ({"vision": ("package:efficientnet_lite0",) * 2}, "is named twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_a_sentence(case: str, config: MeasureConfig) -> None:
    changes, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        measure(replace(config, **changes))


@pytest.mark.parametrize("limit", [1, 3])
def test_too_few_pairs_are_told_before_a_model_is_opened(config: MeasureConfig, limit: int) -> None:
    with pytest.raises(UserError, match=f"{limit} pairs are too few for --metric cka-linear-debiased"):
        measure(replace(config, pairs=replace(config.pairs, limit=limit)))


def test_an_empty_text_and_a_run_without_models_are_told(config: MeasureConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        measure(replace(config, text=str(tmp_path / "empty.txt")))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"has no model yet: let it finish, or train with --loop\.keep-every"):
        measure(replace(config, language=(str(tmp_path / "begun"),)))


def test_a_metric_that_refuses_the_features_is_told(config: MeasureConfig, tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(ord(name)).normal(size=(COUNT, 40)).astype(np.float32))
    wide = replace(config, language=(f"file:{tmp_path / 'a.npy'}",), vision=(f"file:{tmp_path / 'b.npy'}",))
    assert measure(wide)["alignment"][0]["p"] > 0.03
    with pytest.raises(UserError, match="--metric cca cannot be computed of these features"):
        measure(replace(wide, metric="cca", output=tmp_path / "cca"))


def test_a_layer_without_any_difference_is_named(config: MeasureConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.ones((COUNT, 3), np.float32))
    with pytest.raises(UserError, match=r"layer features of 'file:.*flat.npy' gives all 60 pairs the same features"):
        measure(replace(config, vision=(f"file:{tmp_path / 'flat.npy'}",)))


def test_another_measurement_is_not_overwritten_unasked(config: MeasureConfig) -> None:
    measure(config)
    other = replace(config, permutations=59)
    with pytest.raises(UserError, match="permutations is 39 there and 59 here"):
        measure(other)
    assert measure(replace(other, overwrite=True))["n"] == COUNT


def test_the_command_line_prints_a_line_a_pair(config: MeasureConfig, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", "--language", *config.language, "--vision", *config.vision, "--permutations", "19"]
    arguments += ["--pairs.source", config.pairs.source, "--max-length", "20", "--output", str(config.output)]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "model × features.parquet: 0." in told and "calibrated" in told and str(config.output / "measure.md") in told
