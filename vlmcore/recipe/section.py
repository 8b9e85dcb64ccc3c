"""What every part of a recipe has in common: frozen pydantic models that refuse unknown fields.

A field marked `operational` changes how a stage runs (worker counts, ports, log intervals), never
what it produces; such fields stay out of the artifact key (see `content_params`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from vlmcore.recipe.gates import parse_gate
from vlmcore.recipe.stage_faults import Fault

StageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
BenchmarkName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Source = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Dtype = Literal["float32", "bfloat16", "float16"]

Operational = partial(Field, json_schema_extra={"operational": True})
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class CrossFieldError(ValueError):
    """Fields that are right each by itself but not together; holds every such fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(
            "; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text in self.faults)
        )


def _parseable(gate: str) -> str:
    parse_gate(gate)
    return gate


GateText = Annotated[str, AfterValidator(_parseable)]


class Section(BaseModel):
    """A part of a recipe: unknown fields are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    def content_params(self) -> dict[str, Any]:
        """JSON values of the fields that decide what is produced; operational ones left out."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in values if not _is_operational(type(self), name)}


def _is_operational(model: type[BaseModel], name: str) -> bool:
    extra = model.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))
