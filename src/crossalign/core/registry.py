"""Names for whatever a configuration or the command line can ask for: ours, a user's own, and those of plug-ins.

A plug-in is a package with an entry point in one of our groups (``crossalign.metrics``, ``.teachers``, ``.backbones``,
``.datasets``, ``.tasks``): it has the name that the package registers, and the module that registers it when it is imported.
"""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

from crossalign.core.errors import UserError, unknown

T = TypeVar("T")
E = TypeVar("E")
_loaded: set[str] = set()
_failures: dict[tuple[str, str], str] = {}
_loading = threading.RLock()


class Registry(Mapping[str, T]):
    """Entries of one kind by name; a look-up of a name that is not there raises a sentence with the nearest one.

    Args:
        kind: the word for error messages, such as "divergence".
        entries: what it begins with.
        group: the entry points that add to it. They are loaded once in a process, at the first look-up of a name that is not
            there yet, or when all names are asked for.
        listed: what gives all names, where they are too many for a sentence.
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None, *, group: str = "", listed: str = "") -> None:
        self.kind, self.group, self.listed = kind, group, listed
        self._entries: dict[str, T] = dict(entries or {})

    @overload
    def register(self, name: str, **facts: Any) -> Callable[[E], E]: ...

    @overload
    def register(self, name: str, entry: E, **facts: Any) -> E: ...

    def register(self, name: str, entry: Any = None, **facts: Any) -> Any:
        """Add an entry, or whatever is decorated. ``facts`` about it become its attributes.

        The same function may come again, as it does when its notebook cell is run twice.

        Raises:
            ValueError: another entry has the name.
        """
        if entry is None:
            return lambda decorated: self.register(name, decorated, **facts)
        before = self._entries.get(name)
        if before is not None and _identity(before) != _identity(entry):
            raise ValueError(f"the {self.kind} '{name}' is registered already; give yours another name")
        for fact, value in facts.items():
            setattr(entry, fact, value)
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UnknownName: there is none; the nearest name is given. UserError: a plug-in that has it cannot be loaded.
        """
        if name not in self:
            raise unknown(self.kind, name, self._entries, self.listed)
        if name not in self._entries:
            raise UserError(_failures[self.group, name])
        return self._entries[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry of that name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 (it is this function)

    def __contains__(self, name: object) -> bool:
        """Whether there is such an entry, or a plug-in should have it that cannot be loaded: looking it up says why."""
        if not isinstance(name, str):
            return False
        return name in self._entries or name in self._all() or (self.group, name) in _failures

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self))

    def _all(self) -> dict[str, T]:
        if self.group:
            _load(self.group)
        return self._entries


def _identity(entry: Any) -> Any:
    """What an entry has in common with itself of an earlier run of the code that makes it."""
    if dataclasses.is_dataclass(entry) and not isinstance(entry, type):
        return type(entry), [_identity(getattr(entry, field.name)) for field in dataclasses.fields(entry)]
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", entry)


def _load(group: str) -> None:
    """Import the plug-ins of a group, once; one that cannot be imported leaves a warning, and its reason for later."""
    with _loading:
        if group in _loaded:
            return
        _loaded.add(group)
        from importlib.metadata import entry_points

        for plugin in entry_points(group=group):
            try:
                plugin.load()
            except Exception as error:  # the code of others fails in many ways
                package = plugin.dist.name if plugin.dist else plugin.module
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                text = f"the plug-in '{plugin.name}' of the package '{package}' cannot be loaded ({reason}): mend or remove it"
                _failures[group, plugin.name] = text
                warnings.warn(text, stacklevel=2)
