"""Logits and hidden states of one sample, from transformers and from Megatron-Core stages.

Hidden states are what enters each decoder layer and, last, the final norm: state 0 holds the
embeddings with the image features in place. Both sides give them as they are on rank 0.

Shape suffixes: S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from vlmcore import megatron_cpu
from vlmcore.layout import Layout
from vlmcore.training.precision_samples import Sample


@dataclass(frozen=True)
class States:
    """Logits [S, V] and hidden states [S, H] by layer, in fp32 on the CPU."""

    logits: Tensor
    hidden: dict[int, Tensor]


@torch.no_grad()
def transformers_states(model: nn.Module, decoder: nn.Module, sample: Sample) -> States:
    """The reference.

    Args:
        model: The transformers model.
        decoder: Its part that has `layers` and `norm`.
        sample: What to ask.
    """
    place = megatron_cpu.device()
    hidden: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            hidden[index] = entering[0].float().cpu()

        return hook

    modules: list[nn.Module] = [*decoder.layers, decoder.norm]  # type: ignore[misc,list-item]
    handles = [
        module.register_forward_pre_hook(keep(i), with_kwargs=True)
        for i, module in enumerate(modules)
    ]
    try:
        out = model(**{name: value.to(place) for name, value in sample.inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return States(out.logits[0].float().cpu(), hidden)


class MegatronStates:
    """Runs the chunks of all pipeline stages in turn, without a schedule.

    Args:
        chunks: This rank's part of the model.
        layout: How the model lies.
        num_layers: Decoder layers of the whole model.
    """

    def __init__(
        self, chunks: Sequence[MegatronModule], layout: Layout, *, num_layers: int
    ) -> None:
        self.chunks = chunks
        self.layout = layout
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self.ranks = dist.get_process_group_ranks(self.group)
        self.num_stages = len(self.ranks) * len(chunks)
        self.num_layers = num_layers

    @torch.no_grad()
    def logits(self, sample: Sample) -> Tensor:
        """Logits [S, V], on every rank."""
        place = megatron_cpu.device()
        num_tokens = sample.input_ids.shape[1]
        step = self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1
        padding = -num_tokens % step  # behind the sample, where no token attends to it
        ids = torch.cat([sample.input_ids, sample.input_ids[:, -1:].expand(-1, padding)], dim=1)
        positions = torch.cat(
            [sample.position_ids, sample.position_ids[..., -1:].expand(-1, -1, padding)], dim=2
        )
        pixels = {name: value.to(place) for name, value in sample.vision_inputs.items()}
        out: Tensor | None = None
        for stage in range(self.num_stages):
            chunk, owner = self.chunks[stage // len(self.ranks)], stage % len(self.ranks)
            if dist.get_rank() == self.ranks[owner]:
                if stage:
                    chunk.set_input_tensor(out)
                out = chunk(ids.to(place), positions.to(place), None, **pixels)
            out = self._shared(out, owner)
        assert out is not None
        return out[0, :num_tokens].float().cpu()

    @contextmanager
    def recorded(self) -> Iterator[dict[int, Tensor]]:
        """Fills the dict with this rank's hidden states of a run inside."""
        found: dict[int, Tensor] = {}

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            found[0] = args[0] if args else kwargs["hidden_states"]

        def leaving(layer: Any, _: Any, output: tuple[Tensor, Any]) -> None:
            found[layer.layer_number] = output[0]  # counted from 1 over the whole model

        handles = []
        for layer in (layer for chunk in self.chunks for layer in chunk.modules()):
            if isinstance(layer, TransformerLayer):
                handles.append(layer.register_forward_hook(leaving))
                if layer.layer_number == 1:
                    handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def hidden(self, found: dict[int, Tensor], num_tokens: int) -> dict[int, Tensor]:
        """The recorded hidden states [S, H] of all stages, on every rank."""
        per_stage = self.num_layers // self.num_stages
        hidden = {}
        for index in range(self.num_layers + 1):
            state_S1H = found.get(index)
            if state_S1H is not None and self.layout.sequence_parallel:
                state_S1H = gather_from_sequence_parallel_region(state_S1H)
            owner = max(index - 1, 0) // per_stage % len(self.ranks)
            hidden[index] = self._shared(state_S1H, owner)[:num_tokens, 0].float().cpu()
        return hidden

    def _shared(self, tensor: Tensor | None, owner: int) -> Tensor:
        """A tensor of three dimensions that one pipeline rank has, on all of them."""
        if len(self.ranks) == 1:
            assert tensor is not None
            return tensor
        source, place = self.ranks[owner], megatron_cpu.device()
        mine = dist.get_rank() == source
        shape = torch.tensor(tensor.shape if mine and tensor is not None else (0, 0, 0))
        shape = shape.to(place)
        dist.broadcast(shape, source, group=self.group)
        if mine and tensor is not None:
            shared = tensor.contiguous()
        else:
            shared = torch.empty(shape.tolist(), device=place)
        dist.broadcast(shared, source, group=self.group)
        return shared
