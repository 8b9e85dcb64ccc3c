"""Pickles of objects whose classes are not imported, put together from opcodes of protocol 2.

What torch.distributed.checkpoint keeps beside its data are pickles of its own classes; a converter
writes them without importing torch.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable

NONE = b"N"
FALSE = b"\x89"
EMPTY_TUPLE = b")"


def whole(item: bytes) -> bytes:
    """A finished pickle of one item."""
    return b"\x80\x02" + item + b"."


def number(value: int) -> bytes:
    """An integer."""
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    """A string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def sequence(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of integers."""
    return sequence(*map(number, values))


def listing(items: Iterable[bytes]) -> bytes:
    """A list."""
    return b"](" + b"".join(items) + b"e"


def mapping(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def named(module: str, name: str) -> bytes:
    """A class, function or constant of a module."""
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """What a function gives."""
    return function + sequence(*arguments) + b"R"


def instance(cls: bytes, state: bytes = b"") -> bytes:
    """An object made without its `__init__`, with its state: a dict, or what `__setstate__`
    takes."""
    return cls + EMPTY_TUPLE + b"\x81" + (state + b"b" if state else b"")


def with_fields(cls: bytes, **fields: bytes) -> bytes:
    """An object made without its `__init__`, with the attributes."""
    return instance(cls, mapping((text(name), value) for name, value in fields.items()))
