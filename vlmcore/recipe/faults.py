"""Pydantic's errors as sentences: where it stands, what was found and expected, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from vlmcore.recipe.schema import Recipe
from vlmcore.recipe.section import CrossFieldError
from vlmcore.recipe.spellings import OTHERWISE, SAME, VALUES
from vlmcore.recipe.tree import Fault, Loc, Node, child, plain, spoken

_EXPECTED = {
    "model_type": "a mapping of fields",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a string (quote it)",
    "string_too_short": "text that is not empty",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def explain(error: ValidationError, tree: Node) -> list[Fault]:
    """Every fault behind a validation error of `tree`.

    A check across fields only runs where the fields themselves are right. So the unknown ones are
    taken as what they most likely mean, and the recipe is checked once more.
    """
    errors = _errors(error)
    unknown = [e["loc"] for e in errors if e["type"] == "extra_forbidden"]
    faults = [_unknown_field(tree, loc) for loc in unknown]
    if unknown:
        tree = _respelled(tree, unknown)
        errors = _revalidated(tree)
    return faults + _known_field_faults(tree, errors)


def _revalidated(tree: Node) -> list[ErrorDetails]:
    try:
        Recipe.model_validate(plain(tree))
    except ValidationError as error:
        return _errors(error)
    return []


def _errors(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False)


# --- unknown fields ---


def _unknown_field(tree: Node, loc: Loc) -> Fault:
    node = _node_at(tree, loc)
    text = f"unknown field (found {_shown(plain(node))}); {_meaning(loc)[1]}"
    return Fault(node.where, spoken(tree, loc), text)


def _meaning(loc: Loc) -> tuple[str | None, str]:
    """What an unknown field most likely is called here (None: no telling), and the remedy."""
    name, fields = str(loc[-1]), _fields(loc[:-1])
    lower = name.lower().replace("-", "_")
    same = [field for field in (lower, *SAME.get(lower, ())) if field in fields]
    if same:
        return same[0], f"write {same[0]}"
    if lower in OTHERWISE and OTHERWISE[lower][0] in fields:
        field, value = OTHERWISE[lower]
        return None, f"write {field}: {value}"
    close = difflib.get_close_matches(lower, fields)
    if close:
        sure = difflib.get_close_matches(lower, close, n=1, cutoff=0.8)
        return sure[0] if sure else None, f"did you mean {' or '.join(close)}?"
    homes = [_spoken(at) for at, model in _sections().items() if lower in model.model_fields]
    if homes:
        return None, f"{lower} belongs under {' or '.join(homes)}"
    return None, f"known here: {', '.join(fields)}"


def _respelled(tree: Node, unknown: list[Loc]) -> Node:
    """The tree with its unknown fields called what they most likely mean, or left out."""
    for loc in unknown:
        tree = _rename(tree, loc, _meaning(loc)[0])
    return tree


def _rename(node: Node, loc: Loc, name: str | None) -> Node:
    step, *rest = loc
    if rest:
        items = node.value.copy()
        items[step] = _rename(items[step], tuple(rest), name)
        return Node(items, node.where)
    fields = {key: value for key, value in node.value.items() if key != step}
    if name is not None and name not in fields:
        fields[name] = node.value[step]
    return Node(fields, node.where)


# --- known fields with wrong values, and checks across fields ---


def _known_field_faults(tree: Node, errors: list[ErrorDetails]) -> list[Fault]:
    faults: list[Fault] = []
    wrong: dict[Loc, list[ErrorDetails]] = {}
    for error in errors:
        loc, cause = error["loc"], error.get("ctx", {}).get("error")
        if error["type"] == "missing":
            faults.append(_missing(tree, loc))
        elif isinstance(cause, CrossFieldError):
            faults += [_fault(tree, (*loc, *path), text) for path, text in cause.faults]
        elif error["type"] == "value_error":
            faults.append(_fault(tree, loc, str(cause)))
        elif error["type"] == "too_short" and _any_below(loc, errors):
            pass  # the items are there, they are only wrong themselves
        elif error["type"] != "extra_forbidden":
            # What is no field is the member of a union (`str | int`) or pydantic's mark of a key.
            wrong.setdefault(_existing(tree, loc), []).append(error)
    return faults + [_wrong_value(tree, loc, group) for loc, group in wrong.items()]


def _fault(tree: Node, loc: Loc, text: str) -> Fault:
    return Fault(_node_at(tree, loc).where, spoken(tree, loc), text)


def _missing(tree: Node, loc: Loc) -> Fault:
    return _fault(tree, loc, f"missing; add `{loc[-1]}:`{_help(loc)}")


def _wrong_value(tree: Node, loc: Loc, errors: list[ErrorDetails]) -> Fault:
    expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
    if errors[0]["loc"][-1] == "[key]":
        found, text = str(loc[-1]), f"found the name {str(loc[-1])!r}, expected {expected}"
    else:
        found = plain(_node_at(tree, loc))
        text = f"found {_shown(found)}, expected {expected}"
    choices = re.findall(r"'([^']*)'", errors[0].get("ctx", {}).get("expected", ""))
    return _fault(tree, loc, f"{text}{_choice(found, choices) or _help(loc)}")


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "string_pattern_mismatch":
        return f"text of the pattern {error['ctx']['pattern']}"
    if error["type"] == "too_short":
        return "at least one item"
    return _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Input should be ")


def _choice(found: Any, choices: list[str]) -> str:
    lower = str(found).lower()
    meant = [VALUES[lower]] if VALUES.get(lower) in choices else []
    same = [choice for choice in choices if choice.lower() == lower]
    close = meant or same or difflib.get_close_matches(lower, choices, n=1)
    return f"; write {close[0]}" if close else ""


def _help(loc: Loc) -> str:
    info = _field(loc)
    return f" ({info.description})" if info and info.description else ""


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)


# --- the way from a location to its node and its field ---


def _node_at(tree: Node, loc: Loc) -> Node:
    """The node at a location, or the last one on the way to it."""
    node = tree
    for step in loc:
        below = child(node, step)
        if below is None:
            return node
        node = below
    return node


def _existing(tree: Node, loc: Loc) -> Loc:
    node: Node | None = tree
    for depth, step in enumerate(loc):
        node = child(node, step) if node else None
        if node is None:
            return loc[:depth]
    return loc


def _any_below(loc: Loc, errors: list[ErrorDetails]) -> bool:
    return any(len(e["loc"]) > len(loc) and e["loc"][: len(loc)] == loc for e in errors)


@cache
def _sections() -> dict[Loc, type[BaseModel]]:
    """Every model of the schema by its place; `*` stands for an item's name or index."""
    return dict(_walk(Recipe, ()))


def _walk(annotation: Any, loc: Loc) -> Iterator[tuple[Loc, type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield loc, annotation
        for name, info in annotation.model_fields.items():
            yield from _walk(info.annotation, (*loc, name))
        return
    loc = (*loc, "*") if get_origin(annotation) in (tuple, dict) else loc
    for argument in get_args(annotation):
        yield from _walk(argument, loc)


def _spoken(at: Loc) -> str:
    return ".".join("<name>" if step == "*" else str(step) for step in at) or "the top level"


def _fields(loc: Loc) -> dict[str, FieldInfo]:
    """The fields of the section at a location; empty where no section is."""
    for at, model in _sections().items():
        if len(at) == len(loc) and all(p in ("*", step) for p, step in zip(at, loc, strict=True)):
            return model.model_fields
    return {}


def _field(loc: Loc) -> FieldInfo | None:
    """The field at a location, or the one that holds the item there."""
    for depth in range(len(loc), 0, -1):
        info = _fields(loc[: depth - 1]).get(str(loc[depth - 1]))
        if info:
            return info
    return None
