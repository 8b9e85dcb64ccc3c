"""The key of a build: equal keys mean that the work need not be done again."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from vlmcore.artifacts.refs import ArtifactRef
from vlmcore.errors import ArtifactError

Inputs = Mapping[str, ArtifactRef | Sequence[ArtifactRef]]


@dataclass(frozen=True)
class StageSpec:
    """Everything that decides what a build yields, and how its work folder is treated.

    Worker counts, ports, log folders and the like do not belong into `params`: they would make
    a new key for the same content.
    """

    stage: str
    """Instance name, such as `train.full`; the artifact's folder is named after it."""
    kind: str
    """The code that builds it, such as `train`."""
    version: int
    """Raised by the author when the code's output changes for equal parameters."""
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)
    volatile: tuple[str, ...] = ()
    """Glob patterns (`*` crosses folders) of files that do not count in the digest: logs, times."""
    resumable: bool = False
    """The builder finds the scratch folder of an interrupted build; otherwise an empty one."""
    resumes_over: tuple[str, ...] = ()
    """Parameters that the interrupted build may have had other values of."""

    @cached_property
    def key(self) -> str:
        """The key that this build's result is stored under."""
        return compute_key(self.kind, self.version, self.params, self.inputs)

    @cached_property
    def work_key(self) -> str:
        """What the work folder is named after: the key, whatever `resumes_over` is set to."""
        lasting = {name: self.params[name] for name in self.params if name not in self.resumes_over}
        return compute_key(self.kind, self.version, lasting, self.inputs)


def compute_key(stage_kind: str, version: int, params: Mapping[str, Any], inputs: Inputs) -> str:
    """The sha256 (hex) of the kind, its version, its parameters and its inputs' digests.

    Raises:
        ArtifactError: a parameter has no one spelling in JSON (NaN, an object); it is named.
    """
    digests = {
        name: given.digest if isinstance(given, ArtifactRef) else [one.digest for one in given]
        for name, given in inputs.items()
    }
    body = [stage_kind, version, canonical(params, where=f"{stage_kind} params"), digests]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def canonical(value: Any, *, where: str = "params") -> Any:
    """The one JSON spelling of a parameter: plain dicts, lists, strings, numbers, booleans, None.

    Floats keep Python's shortest spelling, so 1e-3 and 0.001 are one value; 1 and 1.0 stay two.

    Raises:
        ArtifactError: the value has no such spelling; `where` leads the message to it.
    """
    match value:
        case Enum():
            return canonical(value.value, where=where)
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return float(value)
        case PurePath():
            return value.as_posix()
        case BaseModel():
            return canonical(value.model_dump(), where=where)
        case Mapping():
            return _canonical_mapping(value, where=where)
        case list() | tuple():
            return [canonical(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise ArtifactError(
        f"{where}: {value!r} ({type(value).__name__}) cannot be part of an artifact's key. "
        "Expected a finite number, string, boolean, None, path, enum, or lists and dicts of them."
    )


def _canonical_mapping(value: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, item in value.items():
        text = name.value if isinstance(name, Enum) else name
        if not isinstance(text, str):
            # json would write 1 and "1" alike
            raise ArtifactError(f"{where}: the name {name!r} is not a string. Write it as one.")
        plain[text] = canonical(item, where=f"{where}.{text}")
    return plain
