"""Where every tensor of the swapped model comes from: the ledger, and reading by it.

Tensors are matched by the names that they have in memory, whatever form either donor was saved in.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families.base import TEXT_PREFIX
from vlmcore.surgery.donor import HEAD, Donor, ExpertLayer
from vlmcore.surgery.shells import Shell
from vlmcore.surgery.vocabulary import Vocabulary, new_rows, with_rows
from vlmcore.weights.experts import layouts_of_experts

Shape = tuple[int, ...]
EMBEDDINGS = f"{TEXT_PREFIX}embed_tokens.weight"
DEFAULT_STD = 0.02  # initializer_range of every family here, where its config says none


@dataclass(frozen=True)
class SwapLedger:
    """Where every tensor of the swapped model comes from.

    Attributes:
        shell: Family of the class that holds it.
        from_llm: Its key → the LLM donor's keys, all as they stand in the files.
        from_vlm: Its key → the vision donor's key.
        fresh: Its key → why it starts random.
        new_tokens: Token that the LLM did not know → its id and where its rows come from.
    """

    shell: str
    from_llm: Mapping[str, tuple[str, ...]]
    from_vlm: Mapping[str, str]
    fresh: Mapping[str, str]
    new_tokens: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """Counts of what moved; the names of what starts random."""
        moved = {"from_llm": len(self.from_llm), "from_vlm": len(self.from_vlm)}
        return self.to_json() | moved


class Merge:
    """The tensors of a swapped model by their published keys.

    Args:
        vlm: Vision donor.
        llm: LLM donor.
        shell: What holds both.
        config: The swapped model's.
        shapes: Published key → shape of each of its tensors.
        vocabulary: Its tokens.
        seed: Of everything that starts random.

    Raises:
        WeightError: Lists the tensors of either donor without a place, and the places without a
            tensor.
    """

    def __init__(
        self,
        vlm: Donor,
        llm: Donor,
        *,
        shell: Shell,
        config: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        vocabulary: Vocabulary,
        seed: int,
    ) -> None:
        self.vlm, self.llm, self.shell = vlm, llm, shell
        self.shapes, self.vocabulary, self.seed = shapes, vocabulary, seed
        self.memory = {key: shell.family.memory_key(key) for key in shapes}
        self.std = float(config["text_config"].get("initializer_range") or DEFAULT_STD)
        self.from_llm: dict[str, tuple[str, ...]] = {}
        self.from_vlm: dict[str, str] = {}
        self.fresh: dict[str, str] = {}
        self.faults: list[str] = []
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._experts = self._expert_layers(config)
        for key in shapes:
            is_text = shell.family.group_of(self.memory[key]) == "llm"
            (self._take_text if is_text else self._take_vision)(key)
        self._find_left_behind()
        if self.faults:
            raise WeightError(
                f"{llm.family.model_type} into {shell.model_type}: {len(self.faults)} tensor(s) do "
                "not fit:\n  " + "\n  ".join(self.faults)
            )

    def ledger(self) -> SwapLedger:
        """Where everything comes from."""
        tokens = {
            token: f"id {self.vocabulary.ids[token]}, {self._origin_of_rows(token)}"
            for token in self.vocabulary.new
        }
        return SwapLedger(self.shell.model_type, self.from_llm, self.from_vlm, self.fresh, tokens)

    def read(self, key: str) -> Tensor:
        """The tensor of a published key."""
        return self._readers[key]()

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that its donor stores it in; fresh tensors have the LLM's."""
        if key in self.from_vlm:
            return self.vlm.tensors[self.from_vlm[key]].dtype
        sources = self.from_llm.get(key) or tuple(self.llm.keys.values())
        return self.llm.tensors[sources[0]].dtype

    def _take_text(self, key: str) -> None:
        memory, shape = self.memory[key], self.shapes[key]
        if memory in self._experts:
            layer = self._experts[memory]
            self.from_llm[key] = tuple(self.llm.keys[one] for one in layer.sources_of(memory))
            self._readers[key] = partial(layer.read, memory)
            return
        home = self._home(memory)
        found = self.llm.info(home)
        is_table = memory in (EMBEDDINGS, HEAD)
        if found is None:
            self.faults.append(f"{key}: the LLM donor has no tensor for it")
        elif found.shape != shape and not (is_table and found.shape[1:] == shape[1:]):
            self.faults.append(f"{key}: shape {found.shape} in the donor, expected {shape}")
        else:
            self.from_llm[key] = (self.llm.keys[home],)
            changed = is_table and (self.vocabulary.new or found.shape != shape)
            reader = self._table if changed else self.llm.read
            self._readers[key] = partial(reader, memory if changed else home)

    def _take_vision(self, key: str) -> None:
        memory, shape = self.memory[key], self.shapes[key]
        found = self.vlm.info(memory)
        if found is not None and found.shape == shape:
            self.from_vlm[key] = self.vlm.keys[memory]
            self._readers[key] = partial(self.vlm.read, memory)
        elif self.shell.family.group_of(memory) == "aligner":
            before = "absent" if found is None else f"shape {found.shape}"
            self.fresh[key] = f"{before} in the vision donor, {shape} here"
            self._readers[key] = partial(self._draw, key)
        else:
            self.faults.append(f"{key}: the vision donor has no tensor of shape {shape} for it")

    def _find_left_behind(self) -> None:
        taken = {source for sources in self.from_llm.values() for source in sources}
        placed = set(self.memory.values())
        left = [key for key in self.llm.keys.values() if key not in taken]
        left += [
            disk for key, disk in self.vlm.keys.items()
            if self.vlm.family.group_of(key) != "llm" and key not in placed
        ]  # fmt: skip
        self.faults += [f"{key}: the shell has no place for it" for key in sorted(left)]

    def _home(self, memory: str) -> str:
        """A text tensor's name in the LLM."""
        prefix = self.llm.family.text_hf_prefix
        return memory.replace(TEXT_PREFIX, prefix) if memory.startswith(TEXT_PREFIX) else memory

    def _expert_layers(self, config: Mapping[str, Any]) -> dict[str, ExpertLayer]:
        """Key in memory → its layer's experts."""
        shapes = {memory: self.shapes[key] for key, memory in self.memory.items()}
        targets = layouts_of_experts(self.shell.family, config, shapes)
        layers: dict[str, ExpertLayer] = {}
        for source, target in zip(self.llm.experts(), targets, strict=True):
            assert self.llm.model.moe is not None
            layer = ExpertLayer(self.llm, source, target, self.llm.model.moe.num_experts)
            layers |= dict.fromkeys(target.keys, layer)
        return layers

    def _table(self, memory: str) -> Tensor:
        """Embeddings or output layer with the new tokens' rows."""
        table = self.llm.read(self._home(memory))
        donor = self._donor_rows(memory)
        rows = new_rows(table, donor, self.vocabulary, generator=self._generator(memory))
        (shape,) = (self.shapes[key] for key, one in self.memory.items() if one == memory)
        return with_rows(table, rows, self.vocabulary, num_rows=shape[0])

    def _donor_rows(self, memory: str) -> dict[str, Tensor]:
        """New token → the vision donor's row of that name, where both models are equally wide."""
        if self.vlm.model.hidden_size != self.llm.model.hidden_size:
            return {}
        theirs = self.vlm.read(memory if memory in self.vlm.keys else EMBEDDINGS)  # it may be tied
        ids = self.vocabulary.donor_ids
        return {token: theirs[ids[token]] for token in self.vocabulary.new if token in ids}

    def _origin_of_rows(self, token: str) -> str:
        if token in self._donor_rows(EMBEDDINGS):
            return "the vision donor's rows of that token"
        return "rows drawn round the mean of the LLM's"

    def _draw(self, key: str) -> Tensor:
        """What transformers initialises such a tensor to."""
        shape = self.shapes[key]
        if key.endswith(".bias"):
            return torch.zeros(shape, dtype=self.dtype(key))
        # a lone vector, such as image_newline, stands among embeddings of unit length
        std = self.std if len(shape) > 1 else 1 / math.sqrt(shape[0])
        drawn = torch.empty(shape).normal_(0.0, std, generator=self._generator(key))
        return drawn.to(self.dtype(key))

    def _generator(self, key: str) -> torch.Generator:
        """Of one tensor, so that its values depend on no other's."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(key.encode()))
