"""References to models, teachers and data: one string, ``[CONTROL:][KIND:]NAME[@REVISION]``, taken apart here alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crossalign.core.errors import UserError
from crossalign.core.reading import user_path

UNTRAINED = ("random", "shuffled")
"""The controls that have the architecture of what they are made from."""
CONTROLS = (*UNTRAINED, "none", "vit")
"""What makes a control out of any other reference to a language model."""


@dataclass(frozen=True)
class Ref:
    """A reference and its parts; nothing is opened or looked for.

    >>> ref = Ref("random:hf:ORG/NAME@v2")
    >>> ref.control, ref.base, ref.kind, ref.name, ref.revision, ref.short_name
    ('random', 'hf:ORG/NAME@v2', 'hf', 'ORG/NAME', 'v2', 'NAME@v2')
    """

    text: str
    controls: tuple[str, ...] = CONTROLS
    """The prefixes that make controls of such references: none for data."""

    def __str__(self) -> str:
        return self.text

    @property
    def control(self) -> str:
        """random, shuffled, none or vit; empty for what is no control."""
        word, colon, _ = self.text.partition(":")
        return word if colon and word in self.controls else ""

    @property
    def base(self) -> str:
        """What a control is made from, or the reference itself."""
        return self.text.partition(":")[2] if self.control else self.text

    @property
    def kind(self) -> str:
        """The word before the colon, such as package, hf, timm, file, python, sklearn or a plug-in's; else "path"."""
        word, colon, _ = self.base.partition(":")
        return word if colon else "path"

    @property
    def rest(self) -> str:
        """What follows the kind, a revision included."""
        _, colon, rest = self.base.partition(":")
        return rest if colon else self.base

    @property
    def name(self) -> str:
        """What follows the kind, without the revision."""
        return self.rest.partition("@")[0] if self.kind == "hf" else self.rest

    @property
    def revision(self) -> str:
        """What follows the @ in the name of a hub page; empty for its newest state."""
        return self.rest.partition("@")[2] if self.kind == "hf" else ""

    @property
    def file(self) -> Path | None:
        """The user's own file of features in ``file:PATH``; None for anything else."""
        return user_path(self.rest) if self.kind == "file" and not self.control else None

    @property
    def short_name(self) -> str:
        """The last part: ``../models/stories260K`` is ``stories260K``."""
        return self.text.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]

    def like(self, text: str) -> str:
        """The reference ``text``, as the same control that this one is, if it is one."""
        return f"{self.control}:{Ref(text, self.controls).base}" if self.control else text

    def of_one_control(self) -> Ref:
        """The reference itself.

        Raises:
            UserError: it makes a control of a control.
        """
        if self.control and Ref(self.base, self.controls).control:
            raise UserError(f"'{self}' makes a control of a control: name a pretrained model after '{self.control}:'")
        return self
