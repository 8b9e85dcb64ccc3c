"""Frames of a video file at a steady rate, each with the second at which it is shown."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmcore.errors import DataError

# A timestamp is rounded to the container's ticks; a frame this much early still counts as due.
TICK_S = 1e-3


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says; `num_frames` is an estimate in some containers."""

    width: int
    height: int
    fps: float
    num_frames: int

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class SampledFrames:
    """Frames with their times.

    Shapes: frames [N, height, width, 3], uint8, RGB; timestamps_s has N entries, growing.
    """

    frames: np.ndarray  # NHWC
    timestamps_s: list[float]


def probe_video(data: bytes) -> VideoInfo:
    """Size, rate and length of a video, from its header and its first frame.

    Raises:
        DataError: it does not open, or its first frame does not decode.
    """
    import cv2  # its import takes half a second, and most datasets hold no video

    capture = _open(data)
    for _, frame_HWC in _frames(capture, [0.0]):
        return VideoInfo(
            width=frame_HWC.shape[1],
            height=frame_HWC.shape[0],
            fps=_rate(capture),
            num_frames=max(1, round(capture.get(cv2.CAP_PROP_FRAME_COUNT))),
        )
    raise DataError("the video's first frame does not decode; encode it again")


def frame_times(duration_s: float, *, fps: float, max_frames: int) -> list[float]:
    """Seconds at which to look: `fps` times a second from 0 on, fewer where those are too many.

    Past `max_frames` the times are spread evenly over the whole video instead.
    """
    count = max(1, math.ceil(duration_s * fps - 1e-9))
    if count <= max_frames:
        return [i / fps for i in range(count)]
    return [i * duration_s / max_frames for i in range(max_frames)]


def sample_frames(data: bytes, *, fps: float = 2.0, max_frames: int = 768) -> SampledFrames:
    """The first frame at or after each of `frame_times`, with the time that it really has.

    Args:
        data: the video file.
        fps: frames a second that are wanted; 2 is what Qwen's processors take.
        max_frames: at most so many.

    Raises:
        DataError: no frame decodes.
    """
    info = probe_video(data)
    times = frame_times(info.duration_s, fps=fps, max_frames=max_frames)
    found = list(_frames(_open(data), times))
    return SampledFrames(np.stack([frame for _, frame in found]), [time for time, _ in found])


def _open(data: bytes) -> Any:
    import cv2

    # One thread: the loader's own processes are the parallel ones.
    capture = cv2.VideoCapture(
        io.BytesIO(data),
        cv2.CAP_FFMPEG,
        [cv2.CAP_PROP_N_THREADS, 1],  # type: ignore[call-overload]
    )
    if not capture.isOpened():
        raise DataError("the video does not open: no container or codec that FFmpeg knows")
    return capture


def _rate(capture: Any) -> float:
    import cv2

    rate = float(capture.get(cv2.CAP_PROP_FPS))
    return rate if math.isfinite(rate) and rate > 0 else 1.0


def _frames(capture: Any, times: list[float]) -> Iterator[tuple[float, np.ndarray]]:
    """For each time in turn the first frame that is due, RGB; none is given twice."""
    import cv2

    due = iter(times)
    target = next(due, None)
    while target is not None and capture.grab():
        now = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if now + TICK_S < target:
            continue
        ok, frame_HWC = capture.retrieve()
        if ok:
            yield now, cv2.cvtColor(frame_HWC, cv2.COLOR_BGR2RGB)
        while target is not None and target <= now + TICK_S:
            target = next(due, None)
