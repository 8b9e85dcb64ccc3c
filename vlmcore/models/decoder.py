"""Megatron-Core's GPTModel as we train it: recompute, deepstack features, chunked loss, parts of a
row on context parallel ranks, and no work on tokens of which nothing is read any more.

Recompute is torch's own, since Megatron's loses the gradient of whatever reaches a layer other than
as its input, as deepstack features do.

Shape suffixes: S tokens of a row, B rows, H hidden, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmcore.models.arriving import await_weights
from vlmcore.models.context_parallel import own_part
from vlmcore.models.layers import RowParams
from vlmcore.models.loss import token_losses


class DecoderLayer(TransformerLayer):
    """A layer whose output may get image features added, or be that of some tokens alone."""

    def forward(
        self,
        *args: Any,
        deepstack_SBH: Tensor | None = None,
        read_N: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Hidden states [S, B, H], of the tokens `read_N` alone [N, 1, H]; and Megatron's context.

        Of the others only keys and values are asked for.
        """
        if read_N is not None:
            return self._forward_read(read_N, **kwargs), None
        hidden_SBH, context = super().forward(*args, **kwargs)
        return hidden_SBH if deepstack_SBH is None else hidden_SBH + deepstack_SBH, context

    def _forward_read(
        self,
        read_N: Tensor,
        *,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None,
        packed_seq_params: RowParams,
        **_: Any,
    ) -> Tensor:
        attended = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=replace(packed_seq_params, read=read_N),
        )
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_NBH = add(attended, hidden_states.index_select(0, read_N), self.hidden_dropout)
        out: Tensor = self._forward_mlp(hidden_NBH)
        return out


class DecoderBlock(TransformerBlock):
    """This rank's layers; those that the config names are computed again in backward."""

    def forward(  # noqa: D102
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        deepstack: Sequence[Tensor] = (),
        is_padding_BS: Tensor | None = None,
        read_N: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if not self.pre_process:
            hidden_states = self.input_tensor
        hidden_SBH = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        if torch.is_grad_enabled() and not hidden_SBH.requires_grad:
            # behind frozen embeddings: Megatron's selective recompute would cut the graph off
            hidden_SBH = hidden_SBH.detach().requires_grad_()

        def run(first: int, last: int, hidden_SBH: Tensor) -> Tensor:
            for i in range(first, last):
                hidden_SBH, _ = self.layers[i](
                    hidden_states=hidden_SBH,
                    attention_mask=attention_mask,
                    rotary_pos_emb=rotary_pos_emb,
                    packed_seq_params=packed_seq_params,
                    padding_mask=is_padding_BS,
                    deepstack_SBH=deepstack[i] if i < len(deepstack) else None,
                    read_N=read_N if i == len(self.layers) - 1 else None,
                )
            return hidden_SBH

        for first, last, again in self._spans():
            if again:
                hidden_SBH = checkpoint(
                    run,
                    first,
                    last,
                    hidden_SBH,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing drops out
                    context_fn=_unlogged_recompute,
                )
            else:
                hidden_SBH = run(first, last, hidden_SBH)
        if self.final_layernorm is not None:
            hidden_SBH = self.final_layernorm(hidden_SBH)
        return make_viewless_tensor(inp=hidden_SBH, requires_grad=True, keep_graph=True)

    def _spans(self) -> Iterator[tuple[int, int, bool]]:
        """Layers that run together, and whether backward computes them again."""
        count, config = len(self.layers), self.config
        if config.recompute_granularity != "full" or not self.training:
            yield 0, count, False
        elif config.recompute_method == "uniform":
            for first in range(0, count, config.recompute_num_layers):
                yield first, min(first + config.recompute_num_layers, count), True
        else:  # block: the first so many layers of each stage
            split = min(config.recompute_num_layers, count)
            for i in range(split):
                yield i, i + 1, True
            yield split, count, False


class Decoder(GPTModel):
    """A GPTModel that is given whole rows and works on this context parallel rank's part of them.

    Attributes:
        num_tokens_known: Tokens of the vocabulary, without padding.
    """

    num_tokens_known: int

    def forward(  # noqa: D102
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        deepstack: Sequence[Tensor] = (),
        is_padding_BS: Tensor | None = None,
    ) -> Tensor:
        if is_padding_BS is not None:
            is_padding_BS = own_part(is_padding_BS, dim=1)
            if self.config.sequence_parallel:
                whole_SB = is_padding_BS.transpose(0, 1).contiguous()
                is_padding_BS = scatter_to_sequence_parallel_region(whole_SB).transpose(0, 1)
        labels = None if labels is None else own_part(labels, dim=1)
        out: Tensor = super().forward(
            own_part(input_ids, dim=1),
            own_part(position_ids, dim=2),
            attention_mask,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=packed_seq_params,
            extra_block_kwargs={
                "deepstack": deepstack,
                "is_padding_BS": is_padding_BS,
                "read_N": self._read(labels, len(deepstack)) if packed_seq_params else None,
            },
        )
        return out

    def _read(self, labels_BS: Tensor | None, num_deepstack: int) -> Tensor | None:
        """Tokens whose hidden states the loss reads, [N]; None where the last layer wants all.

        Experts do: what their router counts, and balances, are all tokens.
        """
        if (
            labels_BS is None
            or len(labels_BS) > 1
            or not self.post_process
            or self.config.sequence_parallel
            or self.config.num_moe_experts
            or num_deepstack >= len(self.decoder.layers)
        ):
            return None
        (read_N,) = torch.where(labels_BS[0] >= 0)
        return read_N if len(read_N) else None

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        labels_BS = kwargs["labels"]
        if labels_BS is None or not self.post_process:
            out: Tensor = super()._postprocess(hidden_states, **kwargs)
            return out
        tied = self.share_embeddings_and_output_weights
        await_weights(self.output_layer)
        return token_losses(
            hidden_states,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels_BS,
            vocab_size=self.num_tokens_known,
            sequence_parallel=self.config.sequence_parallel,
        )


def _unlogged_recompute() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the first and the second computation: routers log their losses in the first."""
    return nullcontext(), _router_losses_kept()


@contextmanager
def _router_losses_kept() -> Iterator[None]:
    tracker = get_moe_layer_wise_logging_tracker()
    before = {name: entry["values"].clone() for name, entry in tracker.items()}
    try:
        yield
    finally:
        for name, values in before.items():
            tracker[name]["values"].copy_(values)
