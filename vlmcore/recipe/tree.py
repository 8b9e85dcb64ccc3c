"""YAML as a tree that remembers where each value was written, so that a fault can name its line.

Scalars follow YAML 1.2's core schema: `1e-4` is a number, `no` and `2024-01-01` are strings. Lists
whose items carry a name are addressed and merged by it: `train.full` is the stage called full.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from vlmcore.errors import RecipeError

Loc = tuple[str | int, ...]

# Fields under which an item of a list (`train`, `evaluate`) carries its name.
NAME_FIELDS = ("name", "benchmark")


@dataclass(frozen=True, slots=True, order=True)
class Where:
    """A place the user wrote: a line of a file, or (line 0) the text of an override."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        numbers = (f":{number}" for number in (self.line, self.column) if number)
        return "".join((self.source, *numbers))


@dataclass(frozen=True, slots=True)
class Node:
    """A YAML value (dict of nodes, list of nodes, or scalar) and where its key was written."""

    value: Any
    where: Where


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing to mend: where it was written, its dotted path, and a sentence with the remedy."""

    where: Where
    path: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.where), self.path, self.text) if part)


def recipe_error(faults: Iterable[Fault]) -> RecipeError:
    """All faults in one error, in the order of the files' lines, overrides last, no fault twice."""
    ordered = sorted(set(faults), key=lambda f: (f.where.line == 0, f.where, f.path, f.text))
    count = "1 fault" if len(ordered) == 1 else f"{len(ordered)} faults"
    return RecipeError(f"the recipe has {count}:\n" + "\n".join(f"  {f}" for f in ordered))


_SCALARS = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")]
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    # Only scalars are constructed; None is the refusal of every other tag.
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*_SCALARS, None)}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Quoted with escapes: the other styles fold line breaks, of which U+0085 comes back as "\n".
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def dump(values: Any) -> str:
    """YAML text that `parse` reads back as the same values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str | bytes, at: Callable[[int], Where], faults: list[Fault]) -> Node:
    """The tree of one YAML document; a key given twice is added to `faults`.

    Args:
        at: turns a line number (from 1) into the place that faults will name.

    Raises:
        RecipeError: the text is no YAML; names line and column, and `faults` so far.
    """
    duplicates: list[tuple[Loc, Where, Where]] = []
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        tree = _Builder(loader, at, duplicates).build(root, at(1)) if root else Node(None, at(1))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = at(mark.line + 1) if mark else at(1)
        if mark and where.line:
            where = replace(where, column=mark.column + 1)
        context = f"{error.context}, " if error.context else ""
        text = f"not YAML: {context}{error.problem}"
        raise recipe_error([*faults, Fault(where, "", text)]) from None
    except yaml.YAMLError as error:  # bytes that are no text
        text = " ".join(str(error).split())
        raise recipe_error([*faults, Fault(at(1), "", f"not YAML: {text}")]) from None
    faults += [
        Fault(again, spoken(tree, loc), f"given twice, first at {first}; keep one of the two")
        for loc, again, first in duplicates
    ]
    return tree


@dataclass(slots=True)
class _Builder:
    loader: _Loader
    at: Callable[[int], Where]
    duplicates: list[tuple[Loc, Where, Where]]
    flattened: set[int] = field(default_factory=set)

    def build(
        self, node: yaml.Node, where: Where, loc: Loc = (), above: tuple[yaml.Node, ...] = ()
    ) -> Node:
        if node in above:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands inside its own anchor", node.start_mark
            )
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            if id(node) not in self.flattened:  # an anchor's mapping is seen again at each alias
                self._find_duplicates(node, loc)
                self.loader.flatten_mapping(node)  # `<<: *anchor`
                self.flattened.add(id(node))
            fields = {}
            for key, value in node.value:
                name, at_key = self._key(key)
                fields[name] = self.build(value, at_key, (*loc, name), above)
            return Node(fields, where)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.build(item, self._line(item), (*loc, index), above)
                for index, item in enumerate(node.value)
            ]
            return Node(items, where)
        return Node(self._scalar(node), where)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError):  # a written tag that the value belies: `!!int x`
            text = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from None

    def _line(self, node: yaml.Node) -> Where:
        return self.at(node.start_mark.line + 1)

    def _key(self, key: yaml.Node) -> tuple[str, Where]:
        # Keys are names: `on:` and `2024:` mean the text, whatever YAML would make of the value.
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a plain name", key.start_mark
            )
        return key.value, self._line(key)

    def _find_duplicates(self, node: yaml.MappingNode, loc: Loc) -> None:
        first: dict[str, Where] = {}
        for key, _ in node.value:
            name, where = self._key(key)
            if name in first:
                self.duplicates.append(((*loc, name), where, first[name]))
            first.setdefault(name, where)


def plain(node: Node) -> Any:
    """The tree's values alone, as dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {name: plain(child) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    return node.value


def child(node: Node, step: str | int) -> Node | None:
    """What stands under a field name, or at an item's name or index; None where nothing does."""
    if isinstance(node.value, dict):
        return node.value.get(step)
    if isinstance(node.value, list):
        index = item_index(node.value, step)
        return None if index is None else node.value[index]
    return None


def item_index(items: list[Node], step: str | int) -> int | None:
    """Index of the item of that name, else the index that `step` is itself."""
    named = [index for index, item in enumerate(items) if item_name(item) == step]
    if named:
        return named[0]
    index = int(step) if str(step).isdecimal() else -1
    return index if 0 <= index < len(items) else None


def item_name(item: Node) -> str | None:
    """The name a list item carries, such as a stage's."""
    for name_field in NAME_FIELDS:
        name = child(item, name_field) if isinstance(item.value, dict) else None
        if name is not None and isinstance(name.value, str):
            return name.value
    return None


def spoken(tree: Node, loc: Loc) -> str:
    """The dotted path as a user says it: `train.full.data`, not `train.1.data`."""
    words, node = [], Node(tree.value, tree.where)
    for step in loc:
        below = child(node, step)
        name = item_name(below) if below and isinstance(node.value, list) else None
        words.append(name or str(step))
        node = below or Node(None, node.where)
    return ".".join(words)


def merge(base: Node, over: Node) -> Node:
    """`base` with the values of `over` on top.

    Dicts merge. A list replaces, unless its items have names: those merge into the base's item of
    the same name or are appended.
    """
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        fields = dict(base.value)
        for name, node in over.value.items():
            fields[name] = merge(fields[name], node) if name in fields else node
        return Node(fields, over.where)
    named = isinstance(over.value, list) and any(item_name(item) for item in over.value)
    if named and isinstance(base.value, list):
        return Node(_merge_items(base.value, over.value), over.where)
    return over


def _merge_items(base: list[Node], over: list[Node]) -> list[Node]:
    merged = list(base)
    waiting = {name: index for index, item in enumerate(base) if (name := item_name(item))}
    for item in over:
        # Popped: a second item of the same name is appended, where validation will find it.
        index = waiting.pop(item_name(item) or "", None)
        if index is None:
            merged.append(item)
        else:
            merged[index] = merge(merged[index], item)
    return merged


def put(node: Node, path: list[str], value: Node) -> Node:
    """A copy of the tree with `value` at `path`; absent fields on the way are created.

    Raises:
        ValueError: the path names a list item that is not there, or leads through a plain value.
    """
    if not path:
        return value
    step, *rest = path
    if isinstance(node.value, list):
        items = list(node.value)
        index = item_index(items, step)
        if index is None:
            raise ValueError(_no_item(items, step))
        items[index] = put(items[index], rest, value)
        return Node(items, node.where)
    if node.value is not None and not isinstance(node.value, dict):
        raise ValueError(f"cannot set {step!r} inside the plain value {node.value!r}")
    fields = dict(node.value or {})
    fields[step] = put(fields.get(step, Node(None, value.where)), rest, value)
    return Node(fields, node.where)


def _no_item(items: list[Node], step: str) -> str:
    names = [item_name(item) or str(index) for index, item in enumerate(items)]
    close = difflib.get_close_matches(step, names)
    found = f"no item is named {step!r}; there are: {', '.join(names) or 'none'}"
    return f"{found}; did you mean {close[0]}?" if close else found
