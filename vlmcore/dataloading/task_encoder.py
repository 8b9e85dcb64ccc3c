"""Energon's TaskEncoder for conversations: cook, tokenise, pack, decode pixels last."""

from __future__ import annotations

import json
import logging
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, stateless
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.cached_encoding import CachedEncoding
from vlmcore.dataloading.encode import BadSampleError, ConversationEncoder, EncodedText
from vlmcore.dataloading.image import image_size, open_image
from vlmcore.dataloading.media import Medium
from vlmcore.dataloading.packing import pack_by_length
from vlmcore.dataloading.rendering import IMAGE_TAG, VIDEO_TAG
from vlmcore.dataloading.samples import ConversationSample, PackedRow, TokenSample, pack_row
from vlmcore.dataloading.video import frames_at, probe_video
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

MAX_SKIPS_IN_A_ROW = 1_000  # past so many, the data is not meant for this model or max_length
_TAGS = re.compile(f"{IMAGE_TAG}|{VIDEO_TAG}")
# what PIL's decoders raise on damaged bytes, and `frames_at`
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError,
    struct.error, zlib.error, DataError,
)  # fmt: skip


@stateless
def cook_conversation(crude: dict[str, Any]) -> ConversationSample:
    """A crude webdataset sample as a conversation; members stay the bytes that were stored."""
    row = json.loads(crude["json"])
    return ConversationSample(
        **basic_sample_keys(crude),
        messages=row["messages"],
        images=[crude[name] for name in row["images"]],
        videos=[crude[name] for name in row.get("videos", [])],
    )


class ConversationTaskEncoder(TaskEncoder[ConversationSample, TokenSample, PackedRow, PackedRow]):
    """Conversations to rows.

    Media are decoded only once their sample has a place in a row, so the packing buffer holds
    tokens and compressed bytes, never pixels. Samples that cannot be trained on are skipped; each
    row counts, by cause, those since the row before.

    Args:
        encoder: Tokenizer, template and processor of the model.
        max_length: Tokens of a row.
        truncation: What becomes of a longer sample: `delete` skips it, `right` cuts its end.
        multiple: Rows are padded to a multiple of this many tokens (sequence parallelism).
        cached: Remembers what samples were made into; it changes no row. None: nothing does.
    """

    cookers = (Cooker(cook_conversation),)
    decoder = None  # members arrive as bytes

    def __init__(
        self,
        encoder: ConversationEncoder,
        *,
        max_length: int,
        truncation: Literal["delete", "right"] = "delete",
        multiple: int = 1,
        cached: CachedEncoding | None = None,
    ) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.truncation = truncation
        self.multiple = multiple
        self.cached = cached
        # tensors that depend on what else is in the sample, or are kept for one
        self._by_sample = cached is not None or bool(encoder.media and encoder.media.tiles_by_count)
        self._dropped: Counter[str] = Counter()
        self._skips_in_a_row: Counter[str] = Counter()

    @stateless
    def preencode_sample(self, sample: ConversationSample) -> TokenSample:
        """Tokens from the text and the sizes of its media; no pixels are unpacked yet."""
        try:
            encoded = self._encode(sample)
        except BadSampleError as error:
            self._skip(sample.__key__, error)
        self._skips_in_a_row.clear()
        return encoded

    @stateless
    def postencode_sample(self, sample: TokenSample) -> TokenSample:
        """Decodes the media; what the vision side wants of them may be made for a row at once."""
        try:
            if self._by_sample:
                sample.vision = self._tensors(sample.media, sample.files) if sample.media else {}
            else:
                sample.pixels = _decode_all(sample.media, sample.files)
        except BadSampleError as error:
            self._skip(sample.__key__, error)
        sample.files = []
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

    def _encode(self, sample: ConversationSample) -> TokenSample:
        cut_at = self.max_length if self.truncation == "right" else None

        def make() -> EncodedText:
            media = self._measure(sample)
            return self.encoder.encode(sample.messages, media, cut_at=cut_at)

        text = make() if self.cached is None else self.cached.text(sample, make, cut_at=cut_at)
        length = len(text.input_ids)
        if length > self.max_length:
            raise BadSampleError("too_long", f"{length} tokens, max_length is {self.max_length}")
        if self._cut_to_one_tiled(text.media, sample):
            raise BadSampleError("too_long", "of several images one is left, which is read tiled")
        if not text.loss_scale.any():
            raise BadSampleError("no_loss", "no token carries loss")
        images, videos = iter(sample.images), iter(sample.videos)
        return TokenSample.derive_from(
            sample,
            input_ids=text.input_ids,
            labels=text.labels,
            loss_scale=text.loss_scale,
            position_ids=text.position_ids,
            media=text.media,
            files=[next(images if medium.video is None else videos) for medium in text.media],
        )

    def _tensors(self, media: Sequence[Medium], files: Sequence[bytes]) -> dict[str, Tensor]:
        processor = self.encoder.media
        assert processor is not None

        def make() -> dict[str, Tensor]:
            return processor.tensors(media, _decode_all(media, files))

        return make() if self.cached is None else self.cached.tensors(media, files, make)

    def _cut_to_one_tiled(self, left: Sequence[Medium], sample: ConversationSample) -> bool:
        num_images = sum(medium.video is None for medium in left)
        processor = self.encoder.media
        return num_images == 1 < len(sample.images) and bool(processor and processor.tiles_by_count)

    def _measure(self, sample: ConversationSample) -> list[Medium]:
        """The sample's media in the order of their tags."""
        processor = self.encoder.media
        found = []
        for tag, file in _in_order(sample):
            if processor is None or (tag == VIDEO_TAG and "video" not in processor.placeholders):
                raise BadSampleError("unsupported_media", f"the model takes no {tag}")
            try:
                if tag == VIDEO_TAG:
                    found.append(processor.video(probe_video(file)))
                else:
                    alone = len(sample.images) == 1
                    found.append(processor.image(image_size(file), alone=alone))
            except _DECODE_ERRORS as error:
                raise BadSampleError("bad_media", str(error)) from error
        return found

    def _skip(self, key: str, error: BadSampleError) -> NoReturn:
        if not self._dropped[error.cause]:
            log.info("skipped sample %s (%s): %s", key, error.cause, error)
        self._dropped[error.cause] += 1
        self._skips_in_a_row[error.cause] += 1
        if self._skips_in_a_row.total() >= MAX_SKIPS_IN_A_ROW:
            causes = ", ".join(f"{n} {cause}" for cause, n in self._skips_in_a_row.most_common())
            raise DataError(
                f"{MAX_SKIPS_IN_A_ROW} samples in a row cannot be trained on: {causes}; the last "
                f"one is {key}: {error}. Raise max_length, or take data that fits this model."
            ) from error
        raise SkipSample from error

    def _row(self, samples: Sequence[TokenSample]) -> PackedRow:
        dropped, self._dropped = self._dropped, Counter()
        return pack_row(
            samples,
            vision=self._vision(samples),
            pad_token_id=self.encoder.tokenizer.pad_token_id,
            multiple=self.multiple,
            dropped=dropped,
        )

    def _vision(self, samples: Sequence[TokenSample]) -> list[dict[str, Tensor]]:
        """What the vision side wants of a row's media, in turn.

        One call of the processor for all: it checks its options for longer than it works on a
        small image.
        """
        if self._by_sample:
            return [sample.vision for sample in samples]
        pixels = [one for sample in samples for one in sample.pixels]
        if not pixels:
            return []
        assert self.encoder.media is not None
        return [self.encoder.media.tensors([m for s in samples for m in s.media], pixels)]


def _in_order(sample: ConversationSample) -> list[tuple[str, bytes]]:
    """The sample's files in the order of their tags.

    Raises:
        BadSampleError: There are more or fewer tags than files.
    """
    waiting = {IMAGE_TAG: list(sample.images), VIDEO_TAG: list(sample.videos)}
    tags = [tag for message in sample.messages for tag in _TAGS.findall(message["content"])]
    counts = {tag: tags.count(tag) for tag in waiting}
    expected = {tag: len(files) for tag, files in waiting.items()}
    if counts != expected:
        raise BadSampleError("tag_mismatch", f"tags {counts}, files {expected}")
    return [(tag, waiting[tag].pop(0)) for tag in tags]


def _decode_all(media: Sequence[Medium], files: Sequence[bytes]) -> list[Image.Image | np.ndarray]:
    try:
        return [_decode(medium, file) for medium, file in zip(media, files, strict=True)]
    except _DECODE_ERRORS as error:
        raise BadSampleError("bad_media", str(error)) from error


def _decode(medium: Medium, file: bytes) -> Image.Image | np.ndarray:
    return open_image(file) if medium.video is None else frames_at(file, medium.times_s)
