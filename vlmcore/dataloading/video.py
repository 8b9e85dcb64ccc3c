"""Frames of a video file at given times."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
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


def probe_video(data: bytes) -> VideoInfo:
    """Size, rate and length of a video, from its header and its first frame.

    Raises:
        DataError: it does not open, or its first frame does not decode.
    """
    import cv2  # its import takes half a second, and most datasets hold no video

    capture = _open(data)
    for frame_HWC in _frames(capture, [0.0]):
        return VideoInfo(
            width=frame_HWC.shape[1],
            height=frame_HWC.shape[0],
            fps=_rate(capture),
            num_frames=max(1, round(capture.get(cv2.CAP_PROP_FRAME_COUNT))),
        )
    raise DataError("the video's first frame does not decode; encode it again")


def frames_at(data: bytes, times_s: Sequence[float]) -> np.ndarray:
    """For each time the first frame at or after it: [N, height, width, 3], uint8, RGB.

    There are always as many frames as times: what is asked for past the end, which a header may
    promise, is the last frame again.

    Args:
        data: the video file.
        times_s: seconds, growing.

    Raises:
        DataError: no frame decodes.
    """
    found = list(_frames(_open(data), times_s))
    if not found:
        raise DataError("no frame of the video decodes; encode it again")
    found += [found[-1]] * (len(times_s) - len(found))
    return np.stack(found)


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


def _frames(capture: Any, times_s: Sequence[float]) -> Iterator[np.ndarray]:
    """For each time in turn the first frame that is due, RGB, the same one twice if need be."""
    import cv2

    due = iter(times_s)
    target = next(due, None)
    while target is not None and capture.grab():
        now = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if now + TICK_S < target:
            continue
        ok, frame_HWC = capture.retrieve()
        if not ok:
            continue
        frame_HWC = cv2.cvtColor(frame_HWC, cv2.COLOR_BGR2RGB)
        while target is not None and target <= now + TICK_S:
            yield frame_HWC
            target = next(due, None)
