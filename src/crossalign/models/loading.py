"""The one loader of weights: files to tensors, tensors into a model, and one sentence for those that do not fit."""

import copy
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from crossalign.core.errors import UserError, cause, first_line, some
from crossalign.core.files import atomic_path, cache_dir, content_key, file_hash, kept
from crossalign.core.reading import check_whole
from crossalign.data.model_files import Source, quiet, weight_files

T = TypeVar("T")

CONSTANTS = re.compile(r"(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Names of constants that old versions used to save with the weights."""


def built(build: Callable[[], T], seed: int, meta: bool) -> T:
    """``build()`` with the initial weights of ``seed``, leaving the caller's random state alone; or without any memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        return build()


@torch.no_grad()
def shuffle_weights(model: nn.Module, seed: int) -> None:
    """Permute the entries of each parameter, embeddings and norms included: its values stay, their places go."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


@contextmanager
def building(owner: str) -> Iterator[None]:
    """Building the model that a configuration describes: what no model can be is told in a sentence, with its ``owner``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each architecture of each library raises its own
        raise UserError(
            f"the configuration of {owner} describes no model that can be built ({cause(error)}): copy it again"
        ) from error


def load_pretrained(model_class: Any, source: Source, config: Any, heads: re.Pattern[str], **arguments: Any) -> Any:
    """A model of transformers with its weights in fp32, from safetensors, a .bin or a .gguf file, whole or in shards.

    Args:
        model_class: whose ``from_pretrained`` it is.
        source: where the files lie.
        config: its configuration.
        heads: names of tensors that published checkpoints hold beside the base model.
        arguments: further ones of ``from_pretrained``.

    Raises:
        UserError: weights that cannot be read, hold more than tensors, or do not fit.
    """
    files = weight_files(source)
    for file in files:
        check_whole(file)
    if source.gguf:  # it takes half a minute to dequantise: once
        folder = cache_dir("gguf") / content_key(file=file_hash(files[0]), model=model_class.__name__, arguments=arguments)

        def dequantise() -> None:
            model = _from_gguf(model_class, source, config, heads, arguments)
            with quiet(), atomic_path(folder) as temporary:
                model.save_pretrained(temporary)

        return kept(lambda: load_pretrained(model_class, Source(source.ref, folder), config, heads, **arguments), dequantise)
    return _loaded(model_class, source, config, heads, arguments | {"use_safetensors": files[0].suffix == ".safetensors"})


def _loaded(model_class: Any, source: Source, config: Any, heads: re.Pattern[str], arguments: dict[str, Any]) -> Any:
    """What ``from_pretrained`` gives, in fp32 and checked."""
    with building(f"'{source.ref}'"), _reading(f"of '{source.ref}'", weight_files(source)[0]), quiet():
        model, info = model_class.from_pretrained(
            source.folder,
            config=config,
            dtype=torch.float32,  # transformers would keep a half-precision checkpoint's type
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be told of them, and to refuse them, in a sentence
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,  # of a .bin
            **arguments,
        )
    unexpected = [name for name in info["unexpected_keys"] if not heads.search(name) and not CONSTANTS.search(name)]
    _refuse(f"'{source.ref}'", info["missing_keys"], unexpected, info["mismatched_keys"])
    _check_numbers(f"'{source.ref}'", dict(model.named_parameters()))
    return model


def _from_gguf(model_class: Any, source: Source, config: Any, heads: re.Pattern[str], arguments: dict[str, Any]) -> Any:
    """The model of a llama.cpp file, dequantised, without a bar for its tensors."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as reader

    given = {"gguf_file": source.gguf} | arguments
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed, which cannot train, unless told
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
    bar, reader.tqdm = reader.tqdm, lambda items, **_: items
    try:
        return _loaded(model_class, source, copy.deepcopy(config), heads, given)
    finally:
        reader.tqdm = bar


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, or of pickles as far as those hold nothing but tensors.

    Raises:
        UserError: a damaged file, or a pickle with more in it.
    """
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in files:
        check_whole(file)
        with _reading(f"in '{file}'", file):
            is_pickle = file.suffix != ".safetensors"
            state |= torch.load(file, weights_only=True, map_location="cpu") if is_pickle else load_file(file)
    return state


@contextmanager
def _reading(weights: str, file: Path) -> Iterator[None]:
    """Reading weights: what goes wrong is told in a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"'{file}' holds more than tensors, so it was not opened: save the model as safetensors with its save_pretrained"
        ) from error
    except ImportError as error:  # a library that reads this format; its own message says which
        raise UserError(f"cannot read the weights {weights}: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {weights} ({first_line(error)}): copy or fetch them again") from error


@torch.no_grad()
def put_tensors(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], owner: str, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_
) -> None:
    """Copy ``state`` into the ``target`` tensors of a model, all of which it must name, no others, and in their shapes.

    Args:
        target: the tensors to fill, by name.
        state: their values, by name.
        owner: of the values, for messages, such as "'package:minilm'".
        put: copies a value into a tensor that may be held in shares.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; nothing is ever left at its initial value silently.
    """
    shapes = [(name, state[name].shape, target[name].shape) for name in target.keys() & state.keys()]
    mismatched = [(name, saved, expected) for name, saved, expected in shapes if saved != expected]
    _refuse(owner, target.keys() - state.keys(), state.keys() - target.keys(), mismatched)
    _check_numbers(owner, state)
    for name, value in state.items():
        put(target[name], value)


def _check_numbers(owner: str, state: Mapping[str, Tensor]) -> None:
    """Raise UserError where tensors hold NaN or infinity: all that a model of them says would be NaN."""
    bad = [
        name
        for name, value in state.items()
        if value.is_floating_point() and value.numel() and not all(end.isfinite() for end in value.aminmax())
    ]
    if bad:
        raise UserError(f"the weights of {owner} hold values that are no finite numbers, in {some(bad)}: fetch them again")


def _refuse(owner: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise UserError, naming the first three, where there is any; ``mismatched`` ones with the saved and the expected shape.

    A tensor that was not loaded would be left at random without a word; one left over shows a wrong architecture.
    """
    for names, fault in (
        ([f"{name} {tuple(saved)}, not {tuple(expected)}" for name, saved, expected in mismatched], "do not fit the model"),
        (missing, "lack tensors of the model"),
        (unexpected, "hold tensors that the model has no place for"),
    ):
        if names := sorted(names):
            raise UserError(f"the weights of {owner} {fault}: {some(names)}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``trainable`` and ``total``, tied ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(size for size, trains in sizes if trains), "total": sum(size for size, _ in sizes)}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, tied ones once; a checkpoint holds these alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
