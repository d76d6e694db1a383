"""State as code: sections of entries in one YAML file, checked with the line named, compared with what is, and applied.

An app declares its Sections; a command puts those of several apps together. What is exported and applied unchanged is
exported again byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from apps.core.errors import InvalidRequest


class DeclarationError(InvalidRequest):
    """A file that cannot be applied: the line, the field, and why."""


class Entry(BaseModel):
    """One thing of a section. What is None is left out of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @property
    def key(self) -> str:
        """What it is known by within its section."""
        return str(self.name)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of thing. `write` makes or changes one; `remove` is None where the file may not leave any out."""

    name: str
    entry: type[Entry]
    read: Callable[[], Sequence[Any]]
    write: Callable[[Any], None]
    remove: Callable[[str], None] | None = None
    may_add: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """`before` is None for what is new, `after` for what goes."""

    section: Section
    key: str
    before: Entry | None
    after: Entry | None

    def __str__(self) -> str:
        what = f"{self.section.name.removesuffix('s')} {self.key}"
        if self.before is None:
            return f"+ {what}: {_fields(self.after)}"
        if self.after is None:
            return f"- {what}"
        old, new = self.before.model_dump(), self.after.model_dump()
        return f"~ {what}: " + ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name])


def _fields(entry: Entry | None) -> str:
    return (
        "" if entry is None else ", ".join(f"{name} {value!r}" for name, value in entry.model_dump(exclude_none=True).items())
    )


Wanted = Mapping[str, Sequence[Entry]]


def export(sections: Sequence[Section]) -> str:
    """All that is, as a file."""
    body = {s.name: [entry.model_dump(exclude_none=True) for entry in s.read()] for s in sections}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def parse(text: str, sections: Sequence[Section]) -> dict[str, list[Entry]]:
    """Raises DeclarationError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise DeclarationError(f"line {mark.line + 1 if mark else 1}: {getattr(error, 'problem', 'this is no YAML')}") from None
    except (ValueError, RecursionError):
        raise DeclarationError("line 1: a value is out of range, or nested too deeply") from None
    if not isinstance(body, dict):
        raise DeclarationError("line 1: the file is a mapping of sections")
    known = {section.name: section for section in sections}
    for name in body:
        if name not in known:
            raise DeclarationError(f"line {_line(root, (name,))}: no section is called {str(name)[:100]}")
    return {section.name: _entries(section, body.get(section.name), root) for section in sections}


def _entries(section: Section, rows: Any, root: Any) -> list[Entry]:
    if not isinstance(rows, list):
        raise DeclarationError(f"line {_line(root, (section.name,))}: {section.name} is a list; an empty one is []")
    entries: list[Entry] = []
    for number, row in enumerate(rows):
        try:
            entries.append(section.entry.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            path = (section.name, number, *first["loc"])
            field = ".".join(map(str, first["loc"])) or "the entry"
            raise DeclarationError(f"line {_line(root, path)}: {section.name}[{number}]: {field}: {first['msg']}") from None
        if entries[-1].key in {entry.key for entry in entries[:-1]}:
            line = _line(root, (section.name, number))
            raise DeclarationError(f"line {line}: {section.name}[{number}]: {entries[-1].key} is there twice")
    return entries


def _line(node: Any, path: Sequence[Any]) -> int:
    """Where the deepest part of the path that exists begins, from 1."""
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            node = found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        else:
            break
    return 1 if node is None else node.start_mark.line + 1


def changes(sections: Sequence[Section], wanted: Wanted) -> list[Change]:
    """What applying would do, in the order in which it is done. Raises DeclarationError for what may not be done here."""
    found: list[Change] = []
    gone: list[Change] = []
    for section in sections:
        there = {entry.key: entry for entry in section.read()}
        asked = {entry.key: entry for entry in wanted[section.name]}
        if section.remove is None and (missing := sorted(there.keys() - asked.keys())):
            raise DeclarationError(f"{section.name}: {missing[0]} is missing; none is removed by leaving it out")
        if not section.may_add and (new := sorted(asked.keys() - there.keys())):
            raise DeclarationError(f"{section.name}: there is no {new[0]}, and none is added from here")
        found += [Change(section, k, there.get(k), entry) for k, entry in asked.items() if there.get(k) != entry]
        gone += [Change(section, key, there[key], None) for key in sorted(there.keys() - asked.keys())]
    return [*reversed(gone), *found]


def apply(these: Sequence[Change]) -> None:
    """Raises DeclarationError; call it within a transaction, which then undoes the rest."""
    for change in these:
        try:
            if change.after is not None:
                change.section.write(change.after)
            elif change.section.remove is not None:
                change.section.remove(change.key)
        except InvalidRequest as error:
            raise DeclarationError(f"{change.section.name}: {change.key}: {error.message}") from None
