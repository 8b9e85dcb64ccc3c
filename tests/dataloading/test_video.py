import numpy as np
import pytest

from tests.data_prep.conftest import make_video  # noqa: F401 - a fixture
from vlmcore.dataloading.video import frames_at, probe_video
from vlmcore.errors import DataError


def test_a_header_tells_size_rate_and_length(make_video):  # noqa: F811
    info = probe_video(make_video(num_frames=25, fps=10, size=(96, 64)))
    assert (info.width, info.height, info.num_frames) == (96, 64, 25)
    assert info.duration_s == pytest.approx(2.5)


def test_frames_are_those_at_the_times_asked_for(make_video):  # noqa: F811
    found = frames_at(make_video(num_frames=30, fps=10), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert found.shape == (6, 48, 64, 3)
    # frame i is grey of level 8 i, and frames 0, 5, 10 … are due
    assert found.mean(axis=(1, 2, 3)) == pytest.approx([0, 40, 80, 120, 160, 200], abs=4)


def test_between_two_frames_the_next_one_is_due_and_may_come_twice(make_video):  # noqa: F811
    found = frames_at(make_video(num_frames=8, fps=4), [0.1, 0.2, 0.25, 0.3])
    assert found.mean(axis=(1, 2, 3)) == pytest.approx([8, 8, 8, 16], abs=4)


def test_past_its_end_a_video_stands_still(make_video):  # noqa: F811
    found = frames_at(make_video(num_frames=8, fps=4), [1.75, 2.0, 9.0])
    assert found.mean(axis=(1, 2, 3)) == pytest.approx([56, 56, 56], abs=4)


def test_colours_are_red_green_blue(tmp_path):
    import cv2

    path = tmp_path / "red.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, (32, 32))
    writer.write(np.full((32, 32, 3), (0, 0, 255), np.uint8))  # OpenCV writes blue first
    writer.release()
    red, green, blue = frames_at(path.read_bytes(), [0.0]).mean(axis=(0, 1, 2))
    assert red > 200 > 60 > max(green, blue)


def test_what_is_no_video_is_an_error():
    with pytest.raises(DataError, match="does not open"):
        probe_video(b"not a video")
