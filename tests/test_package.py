"""What `import crossalign` gives."""

from __future__ import annotations

import importlib
import inspect

import pytest

import crossalign


def test_public_names_are_what_they_say_however_they_are_reached() -> None:
    importlib.import_module("crossalign.verbs.adapt")  # a package of the same name as a function
    for _ in range(2):
        assert inspect.isfunction(crossalign.adapt)
        assert all(getattr(crossalign, name) is not None for name in crossalign.__all__)
    from crossalign import adapt, mmd

    assert inspect.isfunction(adapt) and inspect.isfunction(mmd)
    assert importlib.import_module("crossalign.verbs.adapt.job").adapt is adapt


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adpat'"):
        _ = crossalign.adpat
