"""Which layout the experts of a layer are stored in, told from their shapes alone.

Fused experts come output dimension first (transformers 5) or input dimension first (Qwen3-VL-MoE on
the hub). One tensor may fit both (hidden size = 2 · expert size, or = expert size), but never both
tensors of a layer, so the two together always decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vlmcore.families.base import Config, Family, MixtureOfExperts
from vlmcore.families.rows import StackExperts

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertsLayout:
    """How one layer's experts are stored.

    Attributes:
        keys: Per expert: gate, up, down of expert 0, then of 1 …; fused: gate_up, down.
        per_expert: One tensor an expert and projection.
        input_first: Fused, input dimension before output dimension.
        faults: What is wrong; the rest means nothing then.
    """

    keys: tuple[str, ...]
    per_expert: bool = False
    input_first: bool = False
    faults: tuple[str, ...] = ()


def per_expert_shapes(prefix: str, moe: MixtureOfExperts, hidden_size: int) -> dict[str, Shape]:
    """Key → shape of one layer stored expert by expert."""
    up, down = (moe.ffn_hidden_size, hidden_size), (hidden_size, moe.ffn_hidden_size)
    return {
        f"{prefix}{expert}.{name}_proj.weight": shape
        for expert in range(moe.num_experts)
        for name, shape in (("gate", up), ("up", up), ("down", down))
    }


def fused_shapes(
    prefix: str, moe: MixtureOfExperts, hidden_size: int, *, input_first: bool
) -> dict[str, Shape]:
    """Key → shape of one layer whose experts share two tensors."""
    gate_up, down = (2 * moe.ffn_hidden_size, hidden_size), (hidden_size, moe.ffn_hidden_size)
    if input_first:
        gate_up, down = gate_up[::-1], down[::-1]
    count = moe.num_experts
    return {f"{prefix}gate_up_proj": (count, *gate_up), f"{prefix}down_proj": (count, *down)}


def experts_layout(
    prefix: str,
    found: Mapping[str, Shape],
    *,
    moe: MixtureOfExperts,
    hidden_size: int,
    name: Callable[[str], str],
) -> ExpertsLayout:
    """The layout of one layer.

    Args:
        prefix: Keys begin with it, up to and with `experts.`.
        found: The checkpoint's tensors below it.
        moe: What the config says.
        hidden_size: Likewise.
        name: Key in memory → key to show.
    """
    single = per_expert_shapes(prefix, moe, hidden_size)
    straight = fused_shapes(prefix, moe, hidden_size, input_first=False)
    turned = fused_shapes(prefix, moe, hidden_size, input_first=True)
    for expected, kind in ((single, 0), (straight, 1), (turned, 2)):
        if found == expected:
            return ExpertsLayout(tuple(expected), per_expert=kind == 0, input_first=kind == 2)
    expected = straight if set(found) & set(straight) else single
    other = turned if expected is straight else {}
    faults = [
        f"{name(key)}: missing, expected {expected[key]}" for key in sorted({*expected} - {*found})
    ]
    faults += [f"{name(key)}: no such expert" for key in sorted({*found} - {*expected})]
    faults += [
        f"{name(key)}: shape {found[key]}, expected {expected[key]}"
        + (f", or {other[key]} with the input dimension first" if other else "")
        for key in sorted({*expected} & {*found})
        if found[key] != expected[key]
    ]
    return ExpertsLayout(tuple(found), faults=tuple(faults))


def layouts_of_experts(
    family: Family, config: Config, shapes: Mapping[str, Shape]
) -> list[ExpertsLayout]:
    """How each layer's experts are laid out in tensors of these names (in memory) and shapes."""
    model = family.language_model(config)
    found = []
    for row in (row for row in family.rows(config) if isinstance(row, StackExperts)):
        for layer in range(model.num_layers):
            prefix = row.hf.replace("{layer}", str(layer))
            below = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
            assert model.moe is not None
            layout = experts_layout(
                prefix, below, moe=model.moe, hidden_size=model.hidden_size, name=family.disk_key
            )
            assert not layout.faults, layout.faults  # the architecture has been checked
            found.append(layout)
    return found
