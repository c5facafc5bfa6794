"""``features``: a vision model's features of images with texts, written once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crossalign.config import PairsConfig, TeacherConfig
from crossalign.core.errors import UserError
from crossalign.core.reading import parse_json
from crossalign.core.refs import Ref
from crossalign.verbs import Verb


@dataclass
class FeaturesArgs:
    """A vision model's features of images with texts, written once, so that training needs no vision model."""

    output: Path | None = None
    """The .safetensors file; in the cache by default, named by a hash of teacher and pairs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)


def run(args: FeaturesArgs, _: str) -> str:
    """Write the features, and tell where they are and what they are of."""
    from crossalign.features.store import read_metadata

    path = features(args)
    facts = read_metadata(path)
    layers = parse_json(facts["layers"], f"'{path}'", "make it again", list)
    return f"{path}: {facts['teacher']}, layers {' '.join(layers)}; {facts['pairs']}"


def features(args: FeaturesArgs) -> Path:
    """Write a teacher's features of a set of pairs, or find them written; returns the file.

    A run that was stopped, even killed, goes on where it was, at most 256 images back.

    Raises:
        UserError: teacher or pairs that cannot be opened, an ``output`` that belongs to others, or features that are
            no finite numbers.
    """
    from crossalign.core.device import resolve_device
    from crossalign.data.pairs.load import open_pairs
    from crossalign.features.sources import ImageSource
    from crossalign.features.store import FeatureStore, check_maker, read_metadata

    if Ref(args.teacher.ref).file:
        raise UserError(f"'{args.teacher.ref}' holds features already: name it where they are used, as --teacher.ref")
    resolve_device(args.device)
    source = ImageSource(args.teacher)
    key, output = source.key, args.output  # what is wrong with teacher or output is said before every image is checked
    if output is not None and (output.is_dir() or output.suffix != ".safetensors"):
        raise UserError(f"--output {output} is no name of a features file: it must end in .safetensors")
    if output is not None and output.is_file():
        check_maker(output, read_metadata(output), key)
    return FeatureStore(open_pairs(args.pairs), args.device).write(source, output)


FEATURES = Verb(FeaturesArgs, run)
