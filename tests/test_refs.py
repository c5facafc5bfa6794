"""References taken apart: which control, which kind, which name and revision."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossalign.core.errors import UserError
from crossalign.core.refs import UNTRAINED, Ref

PARTS = {  # control, base, kind, name, revision, short name
    "package:minilm": ("", "package:minilm", "package", "minilm", "", "minilm"),
    "random:hf:ORG/NAME@v2": ("random", "hf:ORG/NAME@v2", "hf", "ORG/NAME", "v2", "NAME@v2"),
    "hf:ORG/SET:part@v1": ("", "hf:ORG/SET:part@v1", "hf", "ORG/SET:part", "v1", "part@v1"),
    "none:../models/stories260K": ("none", "../models/stories260K", "path", "../models/stories260K", "", "stories260K"),
    "vit:a/b.gguf": ("vit", "a/b.gguf", "path", "a/b.gguf", "", "b.gguf"),
    "timm:vit_small.lvd@x": ("", "timm:vit_small.lvd@x", "timm", "vit_small.lvd@x", "", "vit_small.lvd@x"),
    "random": ("", "random", "path", "random", "", "random"),  # a folder of that name
    "vit:": ("vit", "", "path", "", "", ""),
    "": ("", "", "path", "", "", ""),
}


@pytest.mark.parametrize("text", PARTS)
def test_a_reference_has_these_parts(text: str) -> None:
    ref = Ref(text)
    assert (ref.control, ref.base, ref.kind, ref.name, ref.revision, ref.short_name) == PARTS[text]
    assert str(ref) == text and ref.of_one_control() is ref


def test_which_prefixes_are_controls_depends_on_what_is_opened() -> None:
    assert Ref("vit:timm:resnet18", UNTRAINED).kind == "vit" and Ref("random:digits", ()).kind == "random"
    assert Ref("random:sklearn:digits", ()).rest == "sklearn:digits"


def test_a_file_of_features_is_no_control() -> None:
    assert Ref("file:~/a:b.npy").file == Path.home() / "a:b.npy"
    assert Ref("random:file:a.npy").file is None and Ref("a.npy").file is None


def test_a_control_hands_its_kind_on() -> None:
    assert Ref("random:package:minilm").like("stories") == "random:stories"
    assert Ref("random:package:minilm").like("shuffled:stories") == "random:stories"
    assert Ref("package:minilm").like("shuffled:stories") == "shuffled:stories"


def test_a_control_of_a_control_is_refused() -> None:
    with pytest.raises(UserError, match="'random:vit:x' makes a control of a control: name a pretrained model after 'random:'"):
        Ref("random:vit:x").of_one_control()
    assert Ref("random:vit:x", UNTRAINED).of_one_control().base == "vit:x"
