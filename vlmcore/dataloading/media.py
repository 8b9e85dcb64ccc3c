"""Images and videos by the model's own processor: how many tokens each takes, then its tensors.

How many is known before anything is decoded, from sizes alone, so that samples can be packed first
and decoded last. Images go by the arithmetic that their processors apply (checked against the
processors in tests, and against what they return for every sample); videos, which take far longer
to decode, by the processor itself on tensors that hold no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.image import Size
from vlmcore.dataloading.video import VideoInfo
from vlmcore.errors import DataError

_FRAMES_OF_A_VIDEO = 32  # where neither recipe nor processor says: LLaVA-OneVision's own number
# These bound the pixels of all frames together; the other processors those of each frame.
_BOUND_WHOLE_VIDEOS = ("Qwen3VLVideoProcessor",)
# Images of one size are worked on together while they fit the CPU's cache: small ones are done
# sooner so, large ones later.
_PIXELS_TOGETHER = 400_000


@dataclass(frozen=True)
class MediaLimits:
    """How large images and videos may get; None keeps the processor's own limit.

    Attributes:
        max_pixels: Pixels of an image at most, after resizing.
        min_pixels: At least; smaller images are enlarged.
        video_max_pixels: Pixels of a video frame at most.
        fps: Frames taken a second of video, by families whose processor follows the time.
        fps_max_frames: Frames of a video at most; families that take the same number of frames of
            every video take so many.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    video_max_pixels: int | None = None
    fps: float = 2.0
    fps_max_frames: int | None = None


@dataclass(frozen=True)
class Medium:
    """An image or video that is known by its size alone.

    Attributes:
        replacement: What the processor puts where the placeholder stands.
        grid: Patches over time, height and width; None where a family knows no grids.
        seconds_per_step: From one step of a video's grid to the next; None for an image.
        video: Length and rate of a video; None for an image.
        frames: Indices of a video's frames that are looked at.
    """

    replacement: str
    grid: tuple[int, ...] | None
    seconds_per_step: float | None = None
    video: VideoInfo | None = None
    frames: tuple[int, ...] = ()

    @property
    def times_s(self) -> list[float]:
        """When those frames are shown."""
        assert self.video is not None
        return [index / self.video.fps for index in self.frames]


class MediaProcessor:
    """The image and video processors of one model folder.

    Args:
        hf_dir: The folder.
        limits: Sizes allowed.

    Raises:
        DataError: A limit that this family's processor cannot keep.
    """

    def __init__(self, hf_dir: Path, limits: MediaLimits) -> None:
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(hf_dir)
        self.limits = limits
        self._images: Any = self.processor.image_processor
        self._videos: Any = getattr(self.processor, "video_processor", None)
        defaults = self.processor.valid_processor_kwargs._defaults
        self._image_options = dict(defaults.get("images_kwargs", {}))
        self._bound_images()
        if hasattr(self._images, "temporal_patch_size"):  # an image is one frame, not repeated
            self._images.temporal_patch_size = 1  # vlmcore.models.patch_projection knows it
        if limits.video_max_pixels is not None and not self._has_grids(self._videos):
            raise DataError(_no_such_limit(self._videos, "video_max_pixels"))
        self._crop = self._fixed_crop()
        self._by_grid: dict[tuple[int, ...], str] = {}
        # both are asked of every row, and transformers finds them by looking at signatures
        self._frames_are_images = "pixel_values_videos" not in self.processor.model_input_names
        self._no_inputs = {*self.processor.unused_input_names, "num_patches", "video_metadata"}

    @property
    def placeholders(self) -> dict[str, str]:
        """`image` and, where the family takes them, `video` → the token that stands for one."""
        found = {"image": str(self.processor.image_token)}
        if self._videos is not None:
            found["video"] = str(self.processor.video_token)
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what becomes of an image or video, as JSON values."""
        return {
            "images": self._images.to_json_string(),
            "image_options": self._image_options,
            "videos": None if self._videos is None else self._videos.to_json_string(),
            "limits": asdict(self.limits),
        }

    @property
    def merge_size(self) -> int:
        """Patches a side of a merged one, in families whose processor knows grids."""
        return int(self._images.merge_size)

    @property
    def tiles_by_count(self) -> bool:
        """True where an image is cut into tiles only if it is its sample's only one."""
        return "batch_num_images" in self._images.model_input_names

    def image(self, size: Size, *, alone: bool) -> Medium:
        """An image of (width, height) pixels.

        Args:
            size: As it is shown.
            alone: No other image is in its sample; LLaVA-OneVision tiles no others.
        """
        width, height = size
        if self._has_grids(self._images):
            grid = self._image_grid(width, height)
            return Medium(self._replacement_of(grid), grid)
        if hasattr(self._images, "max_patches"):
            count = self._images.get_number_of_image_patches(height, width, self._image_options)
            return Medium(self.processor.replace_image_token({"num_patches": [count]}, 0), None)
        outline: dict[str, Any] = {
            "pixel_values": self._crop,
            "image_sizes": [(height, width)],
            "batch_num_images": [1 if alone else 2],
        }
        return Medium(self.processor.replace_image_token(outline, 0), None)

    def video(self, info: VideoInfo) -> Medium:
        """A video of which the header is known, of a family that takes videos."""
        assert self._videos is not None
        frames = self._frame_indices(info)
        shape = (len(frames), 3, info.height, info.width)
        outputs = self._run_video(
            info, frames, torch.empty(shape, dtype=torch.uint8, device="meta")
        )
        grids = outputs.get("video_grid_thw")
        sampled_fps = len(frames) / _whole_length(info) * info.fps
        return Medium(
            self.processor.replace_video_token(outputs, 0),
            grid=None if grids is None else tuple(grids[0].tolist()),
            seconds_per_step=getattr(self._videos, "temporal_patch_size", 1) / sampled_fps,
            video=info,
            frames=frames,
        )

    def tensors(
        self, media: Sequence[Medium], pixels: Sequence[Image.Image | np.ndarray]
    ) -> dict[str, Tensor]:
        """What the model's `get_image_features` and `get_video_features` want of samples.

        Args:
            media: One sample's, in the order of its text; of several in turn, but for a family
                that tiles by count.
            pixels: Likewise: images as they are shown, videos as frames [N, height, width, 3].

        Raises:
            DataError: The processor makes more or fewer tokens of one than was foretold.
        """
        outputs: dict[str, Any] = {}
        images = [one for one in pixels if isinstance(one, Image.Image)]
        if images:
            few = sum(image.width * image.height for image in images) <= _PIXELS_TOGETHER
            outputs |= self._images(
                [images], return_tensors="pt", disable_grouping=not few, **self._image_options
            )
        made = iter(self._replacements(outputs, len(images)))
        runs = []
        for medium, one in zip(media, pixels, strict=True):
            if medium.video is None:
                found = next(made)
            else:
                frames = torch.from_numpy(np.asarray(one)).permute(0, 3, 1, 2)
                runs.append(self._run_video(medium.video, medium.frames, frames))
                found = self.processor.replace_video_token(runs[-1], 0)
            if found != medium.replacement:
                raise DataError(
                    f"{type(self.processor).__name__} makes {len(found)} characters of "
                    f"placeholders of a medium, {len(medium.replacement)} were foretold: its rule "
                    f"is not the one that vlmcore.dataloading.media knows"
                )
        for name in ("pixel_values_videos", "video_grid_thw"):
            if runs and name in runs[0]:
                outputs[name] = torch.cat([run[name] for run in runs])
        return self._model_inputs(media, outputs)

    def smallest(self) -> dict[str, Tensor]:
        """The tensors of a black image of as few tokens as there can be."""
        image = Image.new("RGB", (8, 8))
        return self.tensors([self.image(image.size, alone=True)], [image])

    def _bound_images(self) -> None:
        limits = {"max_pixels": self.limits.max_pixels, "min_pixels": self.limits.min_pixels}
        given = {name: value for name, value in limits.items() if value is not None}
        if self._has_grids(self._images):
            edges = {"max_pixels": "longest_edge", "min_pixels": "shortest_edge"}
            self._images.size |= {edges[name]: value for name, value in given.items()}
        elif hasattr(self._images, "max_patches"):
            tile = self._images.size["height"] * self._images.size["width"]
            if self.limits.max_pixels is not None:
                self._image_options["max_patches"] = max(1, self.limits.max_pixels // tile)
            if self.limits.min_pixels is not None:
                self._image_options["min_patches"] = max(1, -(-self.limits.min_pixels // tile))
        elif given:
            raise DataError(_no_such_limit(self._images, " and ".join(given)))

    def _fixed_crop(self) -> Tensor:
        """[1, 3, height, width] of zeros without memory: what every image is made into."""
        if self._has_grids(self._images):
            return torch.empty(0)
        made = self._images(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        return torch.zeros(()).expand(1, 3, *made.shape[-2:])

    def _replacement_of(self, grid: tuple[int, ...]) -> str:
        """What an image of this grid is replaced by; few grids are met, and asking takes long."""
        if grid not in self._by_grid:
            outline = {"image_grid_thw": torch.tensor([grid])}
            self._by_grid[grid] = self.processor.replace_image_token(outline, 0)
        return self._by_grid[grid]

    def _replacements(self, outputs: dict[str, Any], num_images: int) -> list[str]:
        """What the images are replaced by that the processor has made into tensors."""
        if num_images and self._has_grids(self._images):
            return [
                self._replacement_of(tuple(grid)) for grid in outputs["image_grid_thw"].tolist()
            ]
        return [self.processor.replace_image_token(outputs, i) for i in range(num_images)]

    def _image_grid(self, width: int, height: int) -> tuple[int, ...]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        rule = self._images
        sides = smart_resize(
            height,
            width,
            factor=rule.patch_size * rule.merge_size,
            min_pixels=rule.size["shortest_edge"],
            max_pixels=rule.size["longest_edge"],
        )
        return (1, *(side // rule.patch_size for side in sides))

    def _frame_indices(self, info: VideoInfo) -> tuple[int, ...]:
        most, total = self.limits.fps_max_frames, _whole_length(info)
        if not hasattr(self._videos, "max_frames"):  # the same number of every video
            count = most or getattr(self._videos, "num_frames", None) or _FRAMES_OF_A_VIDEO
            if count > total:
                return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())
            return self._sampled(info, num_frames=count)
        found = self._sampled(info, fps=self.limits.fps)
        if most is None or len(found) <= most:
            return found
        return self._sampled(info, num_frames=max(2, most // 2 * 2))

    def _sampled(self, info: VideoInfo, **how: Any) -> tuple[int, ...]:
        indices = self._videos.sample_frames(self._metadata(info, frames=None), **how)
        return tuple(map(int, indices))

    @staticmethod
    def _metadata(info: VideoInfo, *, frames: Sequence[int] | None) -> Any:
        from transformers.video_utils import VideoMetadata

        return VideoMetadata(
            total_num_frames=_whole_length(info),
            fps=info.fps,
            width=info.width,
            height=info.height,
            duration=info.duration_s,
            frames_indices=None if frames is None else list(frames),
        )

    def _run_video(self, info: VideoInfo, frames: Sequence[int], pixels: Tensor) -> dict[str, Any]:
        """The processor's outputs for one video of frames [N, 3, height, width]."""
        options: dict[str, Any] = {}
        if self.limits.video_max_pixels is not None:
            together = type(self._videos).__name__ in _BOUND_WHOLE_VIDEOS
            bound = self.limits.video_max_pixels * (len(frames) if together else 1)
            options["size"] = {
                edge: min(own, bound)
                for edge, own in dict(self._videos.size).items()
                if own is not None
            }
        outputs = self._videos(
            [pixels],
            video_metadata=[self._metadata(info, frames=frames)],
            do_sample_frames=False,
            return_metadata=True,
            return_tensors="pt",
            **options,
        )
        return dict(outputs)

    def _model_inputs(self, media: Sequence[Medium], outputs: dict[str, Any]) -> dict[str, Tensor]:
        inputs = {name: value for name, value in outputs.items() if name not in self._no_inputs}
        if self._frames_are_images and "pixel_values_videos" in inputs:
            frames = iter(inputs.pop("pixel_values_videos"))  # [N, 3, height, width] each
            tiles = _in_turn(inputs.get("pixel_values"), outputs.get("num_patches"))
            parts = [next(tiles if one.video is None else frames) for one in media]
            inputs["pixel_values"] = torch.cat(parts)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.ndim == 5:  # [images, tiles, 3, height, width], unpadded
            inputs["pixel_values"] = pixels.flatten(0, 1)
        return inputs

    @staticmethod
    def _has_grids(processor: Any) -> bool:
        return hasattr(processor, "merge_size")


def _whole_length(info: VideoInfo) -> int:
    """Frames of a video; one of a single frame counts as two, the least that a patch spans."""
    return max(2, info.num_frames)


def _in_turn(pixels: Tensor | None, counts: Any) -> Iterator[Tensor]:
    if pixels is None:
        return iter(())
    return iter(pixels.split([int(count) for count in counts]))


def _no_such_limit(processor: Any, names: str) -> str:
    return (
        f"{type(processor).__name__} makes every image the same size, so {names} cannot be kept; "
        f"leave it empty"
    )
