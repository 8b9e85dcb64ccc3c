"""Energon's TaskEncoder for conversations: cook, tokenise, pack, decode pixels last."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, stateless
from PIL import Image

from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.packing import pack_by_length
from vlmcore.dataloading.samples import ConversationSample, PackedRow, TokenSample, pack_row
from vlmcore.errors import DataError


@stateless
def cook_conversation(crude: dict[str, Any]) -> ConversationSample:
    """A crude webdataset sample as a conversation; members stay the bytes that were stored."""
    row = json.loads(crude["json"])
    images = [crude[name] for name in row["images"]]
    return ConversationSample(**basic_sample_keys(crude), messages=row["messages"], images=images)


class ConversationTaskEncoder(TaskEncoder[ConversationSample, TokenSample, PackedRow, PackedRow]):
    """Conversations to rows.

    Images are decoded only once their sample has a place in a row, so the packing buffer holds
    tokens and compressed bytes, never pixels.

    Args:
        encoder: Tokenizer, template and image processor of the model.
        max_length: Tokens of a row; a longer sample is dropped and counted.
        multiple: Rows are padded to a multiple of this many tokens (sequence parallelism).
    """

    cookers = (Cooker(cook_conversation),)
    decoder = None  # members arrive as bytes

    def __init__(self, encoder: ConversationEncoder, *, max_length: int, multiple: int = 1) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.multiple = multiple
        self._num_dropped = 0

    @stateless
    def preencode_sample(self, sample: ConversationSample) -> TokenSample:
        """Tokens from the text and the image sizes; nothing is decoded yet."""
        grids = [self.encoder.grid(Image.open(io.BytesIO(data)).size) for data in sample.images]
        try:
            text = self.encoder.encode(sample.messages, grids)
        except DataError as error:
            raise DataError(f"sample {sample.__key__}: {error}") from error
        if len(text.input_ids) > self.max_length:
            self._num_dropped += 1
            raise SkipSample
        return TokenSample.derive_from(
            sample,
            input_ids=text.input_ids,
            labels=text.labels,
            position_ids=text.position_ids,
            images=sample.images,
        )

    @stateless
    def postencode_sample(self, sample: TokenSample) -> TokenSample:
        """Decodes the images into patches."""
        if sample.images:
            opened = [Image.open(io.BytesIO(data)) for data in sample.images]
            sample.pixel_values, sample.image_grid_thw = self.encoder.patches(opened)
            sample.images = []
        return sample

    def select_samples_to_pack(self, samples: list[TokenSample]) -> list[list[TokenSample]]:
        """Groups the buffer into rows."""
        lengths = [len(sample.input_ids) for sample in samples]
        groups = pack_by_length(lengths, max_length=self.max_length)
        return [[samples[i] for i in group] for group in groups]

    @stateless
    def pack_selected_samples(self, samples: list[TokenSample]) -> PackedRow:
        """One row."""
        return self._row(samples)

    @stateless
    def batch(self, samples: list[TokenSample]) -> PackedRow:
        """Without packing: a micro batch is a row of exactly that many samples, padding-free."""
        return self._row(samples)

    def _row(self, samples: Sequence[TokenSample]) -> PackedRow:
        dropped, self._num_dropped = self._num_dropped, 0
        return pack_row(
            samples,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
            multiple=self.multiple,
            num_dropped=dropped,
        )
