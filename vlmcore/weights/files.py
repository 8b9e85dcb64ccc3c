"""Ranges of files by pread, as arrays.

A memory map of the same range costs a page fault for every few kilobytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vlmcore.errors import WeightError
from vlmcore.weights.dtypes import Raw, raw_type


class FileReader:
    """Keeps the files that it has read from open."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, file: Path, start: int, count: int, dtype: str) -> Raw:
        """`count` elements from byte `start` on.

        Raises:
            WeightError: The file ends before.
        """
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        elements = np.empty(count, raw_type(dtype))
        left = elements.view(np.uint8).data
        while left:
            got = os.preadv(self._open[file], [left], start)
            if not got:
                raise WeightError(f"{file}: truncated at {start} bytes")
            left, start = left[got:], start + got
        return elements

    def close(self) -> None:
        """Closes all of them."""
        while self._open:
            os.close(self._open.popitem()[1])
