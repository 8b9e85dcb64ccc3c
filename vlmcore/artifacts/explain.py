"""Why a stage will run: what differs from its last build, in sentences."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmcore.artifacts.keys import canonical
from vlmcore.artifacts.refs import ArtifactRef
from vlmcore.artifacts.store import Store

_UNSET = "(unset)"


def explain_miss(
    store: Store,
    stage: str,
    *,
    version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, ArtifactRef | Sequence[ArtifactRef] | None],
) -> list[str]:
    """What differs from the last build of `stage`, such as `learning_rate: 0.001 → 0.0001`.

    An input that is None is not there yet: what makes it runs first, and decides.
    """
    last = store.latest(stage)
    if last is None:
        return ["never built"]
    reasons = [f"version {last.version} → {version}"] if last.version != version else []
    reasons += _changes(_flatten(last.params), _flatten(canonical(params)), label="")
    reasons += [f"input {name}: built first" for name, given in inputs.items() if given is None]
    before = {name: _short(ref.digest) for name, ref in last.input_refs if _known(name, inputs)}
    reasons += _changes(before, _digests(inputs), label="input ", of="digest ")
    return reasons or ["same as its last build, whose content is gone or damaged"]


def _changes(
    before: Mapping[str, str], now: Mapping[str, str], *, label: str, of: str = ""
) -> list[str]:
    return [
        f"{label}{name}: {of}{before.get(name, _UNSET)} → {now.get(name, _UNSET)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return flat


def _digests(
    inputs: Mapping[str, ArtifactRef | Sequence[ArtifactRef] | None],
) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, given in inputs.items():
        if isinstance(given, ArtifactRef):
            flat[name] = _short(given.digest)
        elif given is not None:
            flat |= {f"{name}[{i}]": _short(one.digest) for i, one in enumerate(given)}
    return flat


def _known(name: str, inputs: Mapping[str, object]) -> bool:
    base = name.partition("[")[0]
    return base not in inputs or inputs[base] is not None


def _short(digest: str) -> str:
    return f"{digest[:8]}…"
