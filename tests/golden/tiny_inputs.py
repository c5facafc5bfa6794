"""What the golden runs read, the same bytes on every machine: drawn by generators whose streams never change.

Pictures are PPM and features .npy, since what encoders of PNG and parquet write depends on their version. Only the files
that no key is made of (parquet) and the vision models' configurations come from libraries.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHANGED = 1_700_000_000
"""Time of change of every file, in seconds: some keys of the cache are made of it."""
END = "<|endoftext|>"
COLORS = ("black", "red", "green", "yellow", "blue", "purple", "cyan", "white")
"""By whether there is much red, green and blue."""
PAIRS, SPLIT, WIDTH = 80, 60, 12
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "over", "wet", "grass", "and", "birds", "sang")


def write_inputs(folder: Path) -> None:
    """Everything that the runs read, below ``folder``."""
    _write_pictures(folder / "pictures")
    _write_text(folder / "text.txt", 600)
    _write_text(folder / "score.txt", 40)
    _write_tasks(folder / "tasks.json")
    _write_pairs(folder)
    _write_llama(folder / "llama")
    _write_timm(folder / "dino")
    _write_transformers(folder / "vit")
    for path in folder.rglob("*"):
        os.utime(path, (CHANGED, CHANGED))


def uniform(seed: int, *shape: int) -> np.ndarray:
    """Values from -1 to 1, float64, of the bare generator: numpy keeps its stream, unlike that of its distributions."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) / 2.0**52 - 1


def whole(seed: int, below: int) -> Iterator[int]:
    """Whole numbers from 0 up to ``below``, without end."""
    generator = np.random.PCG64(seed)
    while True:
        yield int(generator.random_raw()) % below


def sentences(seed: int) -> Iterator[str]:
    """Sentences of 4 to 8 words, without end."""
    lengths, words = whole(seed, 5), whole(seed + 1, len(WORDS))
    while True:
        yield " ".join(WORDS[next(words)] for _ in range(4 + next(lengths)))


def ppm(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3), uint8, as a file."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _write_pictures(folder: Path) -> None:
    """Three classes of 8 × 8 pictures, 30 of each: horizontal stripes, vertical stripes, noise."""
    stripes = np.zeros((8, 8, 3))
    stripes[::2] = 200
    bases = {"across": stripes, "down": stripes.transpose(1, 0, 2), "noise": np.full((8, 8, 3), 100.0)}
    for number, (name, base) in enumerate(bases.items()):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            noisy = base + 90 * uniform(1000 * number + i, 8, 8, 3)
            (folder / name / f"{i:02}.ppm").write_bytes(ppm(noisy.clip(0, 255).astype(np.uint8)))


def _write_text(path: Path, lines: int) -> None:
    drawn = sentences(lines)
    path.write_text("".join(f"{next(drawn)}.\n" for _ in range(lines)), encoding="utf-8", newline="\n")


def _write_tasks(path: Path) -> None:
    tasks = [{"prompt": f"Add {i} and {i}. ", "completion": f"The sum is {2 * i}, and so on."} for i in range(50)]
    tasks += [{"instruction": f"Double {i}.", "input": f"{i}", "output": f"It is {2 * i}."} for i in range(10)]
    records = [record for record in tasks if "prompt" in record]
    path.write_text(json.dumps(records), encoding="utf-8")
    alpaca = [record for record in tasks if "instruction" in record]
    path.with_name("alpaca.jsonl").write_text("".join(json.dumps(record) + "\n" for record in alpaca), encoding="utf-8")


def _write_pairs(folder: Path) -> None:
    """Pictures of one colour with two captions each, which begin with a word for it, and features that say how red it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    colors = ((uniform(7, PAIRS, 3) + 1) * 127.5).astype(np.uint8)
    images = [ppm(np.broadcast_to(color, (4, 4, 3))) for color in colors]
    drawn = sentences(8)
    names = [COLORS[int(color > 127) + 2 * int(green > 127) + 4 * int(blue > 127)] for color, green, blue in colors]
    captions = [[f"{name} {name} {next(drawn)}", f"{next(drawn)} {name}"] for name in names]
    table = {"id": [f"picture {i}" for i in range(PAIRS)], "image": images, "captions": captions}
    pq.write_table(pa.table({**table, "split": ["train"] * SPLIT + ["validation"] * (PAIRS - SPLIT)}), folder / "pairs.parquet")
    pq.write_table(pa.table(table), folder / "unsplit.parquet")
    features = np.concatenate([colors / 255, uniform(9, PAIRS, WIDTH - 3)], axis=1).astype(np.float32)
    np.save(folder / "features.npy", features[:SPLIT])
    np.save(folder / "held_out.npy", features[SPLIT:])


def _write_llama(folder: Path) -> None:
    """A Llama of two layers with a tokenizer whose tokens are bytes, both written out by hand."""
    from safetensors.numpy import save_file

    width, inner, layers, heads = 32, 48, 2, 4
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 320,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (257, width), "model.norm": (width,), "lm_head": (257, width)}
    for i in range(layers):
        sizes = {
            "q_proj": (width, width),
            "k_proj": (width // 2, width),
            "v_proj": (width // 2, width),
            "o_proj": (width, width),
        }
        shapes |= {f"model.layers.{i}.self_attn.{name}": shape for name, shape in sizes.items()}
        sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        shapes |= {f"model.layers.{i}.mlp.{name}": shape for name, shape in sizes.items()}
        shapes |= {f"model.layers.{i}.{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    weights = {
        f"{name}.weight": (uniform(100 + i, *shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for i, (name, shape) in enumerate(sorted(shapes.items()))
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": END, **flags, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {END: 0} | {letter: i for i, letter in enumerate(letters, 1)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")


def _fill(model: Any) -> Any:
    """The model with weights of our own."""
    import torch

    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(torch.from_numpy(uniform(500 + i, *parameter.shape) * 0.3))
    return model


def _write_timm(folder: Path) -> None:
    """A DINOv2 of three blocks in timm's format."""
    import timm

    sizes = {"img_size": 28, "depth": 3, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
    timm.models.save_for_hf(_fill(model), folder, model_args=sizes, safe_serialization=True)


def _write_transformers(folder: Path) -> None:
    """A ViT of three blocks in the format of transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    _fill(ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=14))).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
