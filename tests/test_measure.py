"""The verb measure: a folder with scores, figures and a page, from features that are computed once; bad input in a sentence."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crossalign import cli, measure
from crossalign.alignment import cka
from crossalign.config import MeasureConfig, PairsConfig, PretrainConfig, TeacherConfig, update
from crossalign.core.errors import UserError
from crossalign.data.pairs.load import open_pairs
from crossalign.features import sources as language_features
from crossalign.features import store as features_module
from crossalign.features.sources import ImageSource, TextSource, bits_per_byte
from crossalign.features.store import FeatureStore, read_metadata
from crossalign.models.language.model import LanguageModel, open_language_model
from crossalign.models.taps import Taps
from crossalign.models.vision import teacher as vision_module
from crossalign.runs.records import open_study
from crossalign.verbs.language_model.job import pretrain
from crossalign.verbs.measure.models import Measured

pytest.importorskip("matplotlib", reason="needs matplotlib")
timm = pytest.importorskip("timm", reason="needs timm")
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "white": (250, 250, 250), "black": (5, 5, 5)}
COUNT = 60
measure_module = import_module("crossalign.verbs.measure.job")  # the name in the package is the function


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


def test_a_second_call_loads_no_weights(config: MeasureConfig, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, vision=(str(place / "vit"),), twins=True, text=str(place / "text.txt"), block=16)
    first = measure(config)
    opened: list[tuple[str, bool]] = []
    real = vision_module.open_teacher

    def counted(ref: str, *, weights: bool = True, **settings: Any) -> Any:
        opened.append((ref, weights))
        return real(ref, weights=weights, **settings)

    monkeypatch.setattr(vision_module, "open_teacher", counted)
    monkeypatch.setattr(language_features, "open_language_model", lambda *_, **__: pytest.fail("opened again"))
    monkeypatch.setattr(FeatureStore, "_compute", lambda *_: pytest.fail("computed again"))
    assert measure(config) == first
    assert opened == [(ref, False) for ref in (config.vision[0], f"random:{config.vision[0]}")]  # each once, for its key


def test_a_pass_that_was_stopped_before_its_file_was_put_together_goes_on(
    config: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, source = open_pairs(config.pairs), TextSource(config.language[0], max_length=17)
    with monkeypatch.context() as stopped:
        stopped.setattr(features_module.shutil, "rmtree", lambda *_: None)  # the parts stay
        path = FeatureStore(pairs, "cpu").write(source)
    whole, told = FeatureStore(pairs).load(path).values, read_metadata(path)
    path.unlink()
    monkeypatch.setattr(TextSource, "_features", lambda *_: pytest.fail("computed again"))
    assert FeatureStore(pairs, "cpu").write(source) == path
    assert torch.equal(FeatureStore(pairs).load(path).values, whole) and read_metadata(path) == told


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


def test_runs_of_one_name_stay_apart(config: MeasureConfig, run: Path, tmp_path: Path) -> None:
    for name in ("plain", "cka"):
        shutil.copytree(run, tmp_path / name / "seed-0")
    result = measure(replace(config, language=tuple(str(tmp_path / name / "seed-0") for name in ("plain", "cka"))))
    assert [(model["run"], model["step"]) for model in result["language"]] == [
        (f"{name}/seed-0", step) for name in ("plain", "cka") for step in (0, 4, 8)
    ]
    assert result["language"][5]["name"] == "cka/seed-0, step 8"
    assert Image.open(config.output / "figures" / "dynamics.png").height > 500  # a row of panels for each


def test_the_folder_that_one_is_in_can_be_a_run(config: MeasureConfig, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert measure(replace(config, language=(".",)))["language"][1]["name"] == "run, step 4"


def test_the_finished_model_is_measured_where_it_is_no_snapshot(config: MeasureConfig, run: Path, tmp_path: Path) -> None:
    uneven = tmp_path / "uneven"
    shutil.copytree(run, uneven)
    (uneven / "snapshots" / "step-0000008").rename(uneven / "snapshots" / "step-0000004.bak")
    result = measure(replace(config, language=(str(uneven),)))
    assert [model["step"] for model in result["language"]] == [0, 4, 8]
    assert result["language"][2]["ref"] == str(uneven / "model")


def test_twins_are_made_once_and_not_of_runs(config: MeasureConfig, place: Path, run: Path) -> None:
    language = (config.language[0], f"random:{config.language[0]}", str(run))
    result = measure(replace(config, language=language, vision=(str(place / "vit"),), twins=True))
    names = [model["name"] for model in result["language"]]
    assert names == ["model", "random model", "run, step 0", "run, step 4", "run, step 8"]
    assert [model["name"] for model in result["vision"]] == ["vit", "random vit"]


def test_layers_that_lie_in_one_file_are_scored_apart(config: MeasureConfig, place: Path, tmp_path: Path) -> None:
    pairs = open_pairs(config.pairs)
    settings: dict[str, Any] = {"ref": str(place / "vit"), "layers": ("1", "2")}
    side, sums = (
        FeatureStore(pairs).write(ImageSource(TeacherConfig(**settings, combine=combine)), tmp_path / f"{combine}.safetensors")
        for combine in ("concat", "sum")
    )
    result = measure(replace(config, vision=(f"file:{side}", f"file:{sums}")))
    assert [model["layers"] for model in result["vision"]] == [["1", "2"], ["features"]]
    again = measure(replace(config, vision=(str(place / "vit"),), vision_layers=("1", "2"), output=tmp_path / "again"))
    assert again["alignment"][0]["score"] == pytest.approx(result["alignment"][0]["score"], abs=1e-6)


def related(names: tuple[str, ...], layers: int, seed: int, size: float = 1.0) -> list[Measured]:
    """Models that see three things, with noise, in each of their layers."""
    draw = torch.Generator().manual_seed(seed)
    seen = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(0))

    def layer() -> torch.Tensor:
        return size * (seen @ torch.randn(3, 8, generator=draw) + torch.randn(COUNT, 8, generator=draw))

    return [Measured(name, name, {str(i): layer() for i in range(layers)}) for name in names]


@pytest.mark.parametrize("metric", ["cka-linear-debiased", "mutual-knn", "dot-product"])
def test_models_score_the_same_however_many_are_scored_together(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MeasureConfig(metric=metric, permutations=19, groups=6)
    language, vision = related(("a", "b", "c"), 3, 1), related(("d", "e"), 2, 2)
    together: list[int] = []
    real = measure_module.ordered_scores

    def counted(xs: list[torch.Tensor], *rest: Any, **options: Any) -> torch.Tensor:
        together.append(len(xs))
        return real(xs, *rest, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(measure_module, "ordered_scores", counted)
    whole = measure_module.align(language, vision, config)
    monkeypatch.setattr(measure_module, "ROOM", 4 * COUNT**2 * (2 * (6 + 4) + 8))
    some = measure_module.align(language, vision, config)
    assert together == ([9, 9] if metric == "dot-product" else [9, 6, 3])  # which holds no matrices
    for one, other in zip(whole, some, strict=True):
        assert (one.language.name, one.vision.name) == (other.language.name, other.vision.name)
        for name in ("scores", "null", "replicates"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)
    assert len({float(one.scores[0, 0]) for one in whole}) == 6


def test_memory_is_asked_for_where_matrices_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MeasureConfig(permutations=19, groups=6)
    language, vision = related(("a", "b"), 3, 1), related(("d",), 2, 2)
    alone = 4 * COUNT**2 * (2 * (3 + 2) + 8)
    monkeypatch.setattr(measure_module, "free_memory", lambda: alone)
    assert len(measure_module.align(language, vision, config)) == 2  # one by one they fit
    monkeypatch.setattr(measure_module, "free_memory", lambda: alone - 1)
    with pytest.raises(UserError, match=r"60 pairs and 3 \+ 2 layers need about .* lower --pairs\.limit, or choose layers"):
        measure_module.align(language, vision, config)
    assert len(measure_module.align(language, vision, replace(config, metric="dot-product"))) == 2


@pytest.mark.parametrize("size", [1e9, 1e-12])
def test_the_unit_of_features_does_not_matter(size: float) -> None:
    config = MeasureConfig(permutations=19, groups=6)
    language, vision = related(("a",), 2, 1), related(("d",), 2, 2)
    (plain,) = measure_module.align(language, vision, config)
    (sized,) = measure_module.align(related(("a",), 2, 1, size), vision, config)
    torch.testing.assert_close(sized.scores, plain.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sized.replicates, plain.replicates, rtol=1e-4, atol=1e-5)


def test_scores_that_are_no_numbers_are_told() -> None:
    config = MeasureConfig(metric="kernel-alignment", permutations=19, groups=6)
    with pytest.raises(UserError, match="some scores of 'a' with 'd' are no finite numbers"):
        measure_module.align(related(("a",), 2, 1, float("nan")), related(("d",), 2, 2), config)


@pytest.mark.parametrize("metric", ["mutual-knn", "cka-rbf", "dot-product"])
def test_any_similarity_measures(config: MeasureConfig, metric: str) -> None:
    result = measure(replace(config, metric=metric, neighbours=5))
    assert -1 <= result["alignment"][0]["score"] <= 1


def test_captions_are_the_first_the_mean_or_all_in_one(config: MeasureConfig) -> None:
    pairs, ref = open_pairs(config.pairs), config.language[0]
    found = {
        captions: FeatureStore(pairs, "cpu").read(TextSource(ref, ("last",), "mean", captions, 24)).values  # type: ignore[arg-type]
        for captions in ("first", "mean", "all")
    }
    opened = open_language_model(ref)

    one, two = pairs.texts[0]
    first, second, both = (tapped(opened, text, "last") for text in (one, two, f"{one} {two}"))
    for captions, expected in (("first", first), ("mean", (first + second) / 2), ("all", both)):
        torch.testing.assert_close(found[captions][:1], expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_text_do_not_depend_on_the_batch(config: MeasureConfig) -> None:
    pairs = open_pairs(config.pairs)
    source = TextSource(config.language[0], pool="last", max_length=24)
    path = FeatureStore(pairs, "cpu").write(source)
    whole = FeatureStore(pairs).load(path, source.key).values
    assert read_metadata(path)["widths"] == "[16, 16, 16]" and whole.shape == (COUNT, 48)
    path.unlink()
    alone = FeatureStore(pairs, "cpu").read(replace(source, batch_size=1)).values
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


def test_other_pairs_do_not_use_the_features(
    config: MeasureConfig, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path / "cache"))
    config = replace(config, vision=(str(place / "vit"),))
    measure(config)
    again = measure(replace(config, pairs=replace(config.pairs, limit=30), output=tmp_path / "few"))
    files = sorted(len(load_file(path)["features"]) for path in (tmp_path / "cache" / "features").glob("*.safetensors"))
    assert again["n"] == 30 and files == [30, 30, 60, 60]  # of the texts and of the images


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
    "few permutations": ({"permutations": 10}, "--permutations 10 cannot show anything at --level 0.05: take 19 or more"),
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"device": "cuda"}, "--device cuda is not on this machine"), ({"text": "nowhere.txt"}, "nowhere.txt")],
)
def test_a_device_and_a_text_that_are_not_there_are_told_before_any_image_is_checked(
    changes: dict[str, Any], sentence: str, config: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("crossalign.verbs.measure.job.open_pairs", lambda *_: pytest.fail("looked at the images"))
    with pytest.raises(UserError, match=sentence):
        measure(replace(config, **changes))


@pytest.mark.parametrize("limit", [1, 3])
def test_too_few_pairs_are_told_before_a_model_is_opened(config: MeasureConfig, limit: int) -> None:
    with pytest.raises(UserError, match=f"{limit} pairs are too few for --metric cka-linear-debiased.*--pairs.split-file"):
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


def test_overwriting_waits_for_a_measurement_to_take_its_place(config: MeasureConfig) -> None:
    measure(config)
    files = {path.name for path in config.output.iterdir()}
    for changes in ({"vision": ("nowhere",)}, {"pairs": PairsConfig(source="nowhere")}, {"language_layers": ("9",)}):
        with pytest.raises(UserError):
            measure(replace(config, overwrite=True, **changes))
        assert {path.name for path in config.output.iterdir()} == files


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_training_run_is_never_overwritten(config: MeasureConfig, run: Path, tmp_path: Path, overwrite: bool) -> None:
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run that is no measurement: choose another --output"):
        measure(replace(config, output=tmp_path / "run", overwrite=overwrite))
    assert {path.name for path in run.iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("absent", ["scipy", "matplotlib"])
def test_an_absent_package_is_told_before_anything_is_opened(
    absent: str, config: MeasureConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else real(name, *rest))
    monkeypatch.setattr(measure_module, "name_models", lambda *_: pytest.fail("went on"))
    with pytest.raises(UserError, match=rf"needs the package '{absent}': pip install 'crossalign\[report\]'"):
        measure(config)


def test_a_device_that_is_not_there_is_told_by_the_options_name(config: MeasureConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps is not on this machine"):
        measure(replace(config, device="mps"))


def test_a_row_for_each_caption_is_refused(config: MeasureConfig, place: Path, tmp_path: Path) -> None:
    rows = pq.read_table(place / "test.parquet").to_pylist()
    flat = [{**row, "captions": text} for row in rows[:20] for text in row["captions"]]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"20 of 40 pairs repeat an image.*give one row an image, with a list of its texts"):
        measure(replace(config, pairs=PairsConfig(source=str(tmp_path / "test.parquet"), split="test")))


def test_more_groups_than_pairs_are_as_many_as_there_are(config: MeasureConfig) -> None:
    """Then each pair is left out alone, and the interval has a degree of freedom less than there are pairs."""
    results = [
        measure(replace(config, groups=groups, output=config.output.with_name(str(groups)))) for groups in (COUNT, COUNT + 7)
    ]
    low, high = zip(*(result["alignment"][0]["interval"] for result in results), strict=True)
    assert low[0] == pytest.approx(low[1], abs=1e-6) and high[0] == pytest.approx(high[1], abs=1e-6)


def test_the_command_line_prints_a_line_a_pair(config: MeasureConfig, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", "--language", *config.language, "--vision", *config.vision, "--permutations", "19"]
    arguments += ["--pairs.source", config.pairs.source, "--max-length", "20", "--output", str(config.output)]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "model × features.parquet: 0." in told and "calibrated" in told and str(config.output / "measure.md") in told
