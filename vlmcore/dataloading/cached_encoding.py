"""What samples were made into before: their tokens, and the tensors of their images and videos.

A key is the digest of everything that decides the result, down to this code: a change that forgets
to raise a number would train on what was made before it. Text and tensors have keys of their own:
tensors do not depend on the text, so stages of another task, template or tokenizer share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from vlmcore import dataloading, families
from vlmcore.dataloading.encode import EncodedText
from vlmcore.dataloading.encoded_cache import EncodedCache
from vlmcore.dataloading.levels import from_levels, to_levels
from vlmcore.dataloading.media import MediaProcessor, Medium
from vlmcore.dataloading.samples import ConversationSample
from vlmcore.dataloading.video import VideoInfo
from vlmcore.weights.sidecar import SIDE_FILES

_CODE = tuple(Path(module.__file__ or "").parent for module in (dataloading, families))
_LIBRARIES = (
    "numpy", "opencv-python-headless", "pillow", "tokenizers", "torch", "torchvision",
    "transformers",
)  # fmt: skip


class CachedEncoding:
    """Remembers what a stage's encoder makes of conversations.

    Args:
        cache: Where it is kept.
        hf_dir: Tokenizer, chat template and processor of the model.
        media: Its processor; None for a text model.
        text_settings: What else decides the tokens, as JSON values.
    """

    def __init__(
        self,
        cache: EncodedCache,
        *,
        hf_dir: Path,
        media: MediaProcessor | None,
        text_settings: Mapping[str, Any],
    ) -> None:
        self._cache = cache
        made_by = [
            {name: metadata.version(name) for name in _LIBRARIES},
            *(_digests(folder.glob("*.py")) for folder in _CODE),
        ]
        settings = {} if media is None else media.settings
        model = _digests(path for pattern in SIDE_FILES for path in hf_dir.glob(pattern))
        self._text_by = _json(["text", made_by, model, settings, dict(text_settings)])
        self._tensors_by = _json(["tensors", made_by, settings])
        self._processors: dict[str, Any] = {}
        if media is not None:
            self._processors = {
                "pixel_values": media.processor.image_processor,
                "pixel_values_videos": getattr(media.processor, "video_processor", None),
            }

    def text(
        self,
        sample: ConversationSample,
        make: Callable[[], EncodedText],
        *,
        cut_at: int | None,
    ) -> EncodedText:
        """The tokens of a sample: from before, or of `make`; its errors are not remembered.

        Args:
            sample: As it came.
            make: Encodes it.
            cut_at: Tokens that `make` leaves at most; None: all.
        """
        told = _json([sample.messages, len(sample.images), cut_at])
        key = _key(self._text_by, told, *sample.images, *sample.videos)
        if (found := self._cache.get(key)) is not None:
            media = json.loads(found.pop("media").numpy().tobytes())
            return EncodedText(**found, media=tuple(_medium(one) for one in media))
        text = make()
        described = _json([asdict(medium) for medium in text.media])
        self._cache.put(
            key,
            {
                "input_ids": text.input_ids,
                "labels": text.labels,
                "loss_scale": text.loss_scale,
                "position_ids": text.position_ids,
                "media": torch.frombuffer(bytearray(described), dtype=torch.uint8),
            },
        )
        return text

    def tensors(
        self,
        media: Sequence[Medium],
        files: Sequence[bytes],
        make: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The tensors of a sample's media: from before, or of `make`."""
        described = _json([asdict(medium) for medium in media])
        key = _key(self._tensors_by, described, *files)
        if (found := self._cache.get(key)) is not None:
            return {name: self._unpacked(name, tensor) for name, tensor in found.items()}
        tensors = make()
        self._cache.put(key, {name: self._packed(name, one) for name, one in tensors.items()})
        return tensors

    def _packed(self, name: str, tensor: Tensor) -> Tensor:
        levels = to_levels(tensor, self._processors[name]) if name in self._processors else None
        return tensor if levels is None else levels

    def _unpacked(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._processors and tensor.dtype == torch.uint8:
            return from_levels(tensor, self._processors[name])
        return tensor


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in paths}


def _medium(values: dict[str, Any]) -> Medium:
    grid, video = values["grid"], values["video"]
    return Medium(
        replacement=values["replacement"],
        grid=None if grid is None else tuple(grid),
        seconds_per_step=values["seconds_per_step"],
        video=None if video is None else VideoInfo(**video),
        frames=tuple(values["frames"]),
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _key(*parts: bytes) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
