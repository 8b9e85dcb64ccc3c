import numpy as np
import pytest

from tests.data_prep.conftest import make_video  # noqa: F401 - a fixture
from vlmcore.dataloading.video import frame_times, probe_video, sample_frames
from vlmcore.errors import DataError


def test_a_header_tells_size_rate_and_length(make_video):  # noqa: F811
    info = probe_video(make_video(num_frames=25, fps=10, size=(96, 64)))
    assert (info.width, info.height, info.num_frames) == (96, 64, 25)
    assert info.duration_s == pytest.approx(2.5)


def test_frames_come_at_the_rate_asked_for_with_their_own_times(make_video):  # noqa: F811
    found = sample_frames(make_video(num_frames=30, fps=10), fps=2)
    assert found.timestamps_s == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert found.frames.shape == (6, 48, 64, 3)
    # frame i is grey of level 8 i, and frames 0, 5, 10 … are due
    levels = found.frames.mean(axis=(1, 2, 3))
    assert levels == pytest.approx([0, 40, 80, 120, 160, 200], abs=4)


def test_a_rate_above_the_videos_own_gives_each_frame_once(make_video):  # noqa: F811
    found = sample_frames(make_video(num_frames=8, fps=4), fps=30)
    assert found.timestamps_s == pytest.approx([i / 4 for i in range(8)])


def test_a_long_video_is_spread_over_max_frames(make_video):  # noqa: F811
    found = sample_frames(make_video(num_frames=30, fps=10), fps=10, max_frames=4)
    assert found.timestamps_s == pytest.approx([0.0, 0.8, 1.5, 2.3], abs=0.06)


@pytest.mark.parametrize(
    ("duration_s", "fps", "expected"),
    [(0.0, 2, [0.0]), (1.0, 2, [0.0, 0.5]), (1.01, 2, [0.0, 0.5, 1.0]), (0.1, 1, [0.0])],
)
def test_times_begin_at_zero_and_end_before_the_video_does(duration_s, fps, expected):
    assert frame_times(duration_s, fps=fps, max_frames=100) == expected


def test_colours_are_red_green_blue(tmp_path):
    import cv2

    path = tmp_path / "red.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (32, 32))
    writer.write(np.full((32, 32, 3), (0, 0, 255), np.uint8))  # OpenCV writes blue first
    writer.release()
    red, green, blue = sample_frames(path.read_bytes()).frames.mean(axis=(0, 1, 2))
    assert red > 200 > 60 > max(green, blue)


def test_what_is_no_video_is_an_error():
    with pytest.raises(DataError, match="does not open"):
        probe_video(b"not a video")
