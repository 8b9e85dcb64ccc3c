"""Video and audio bytes checked by what they are, whatever they are called; kept as they came."""

import struct

from data_prep.causes import BadRowError
from vlmcore.dataloading.video import probe_video
from vlmcore.errors import DataError

AUDIO_SIGNATURES = {
    b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3",
    # a frame of layer III without tags before it: MPEG 1, 2, 2.5, each with and without checksum
    b"\xff\xfb": "mp3", b"\xff\xfa": "mp3", b"\xff\xf3": "mp3", b"\xff\xf2": "mp3",
    b"\xff\xe3": "mp3", b"\xff\xe2": "mp3",
}  # fmt: skip


def check_video(data: bytes) -> str:
    """The extension of the container that was found; its first frame decodes.

    Raises:
        BadRowError: `corrupt_video`.
    """
    extension = _container(data)
    if extension is None:
        raise BadRowError("corrupt_video", "none of MP4, MOV, WebM, MKV, AVI")
    if extension in ("mp4", "mov") and not _boxes_fill(data):
        raise BadRowError("corrupt_video", "the file ends before its last box does")
    try:
        probe_video(data)
    except DataError as error:
        raise BadRowError("corrupt_video", str(error)) from error
    return extension


def check_audio(data: bytes) -> str:
    """The extension of the kind of audio file that was found; nothing is decoded.

    Raises:
        BadRowError: `corrupt_audio`.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav"
    if data[4:11] == b"ftypM4A":
        return "m4a"
    for signature, extension in AUDIO_SIGNATURES.items():
        if data.startswith(signature):
            return extension
    raise BadRowError("corrupt_audio", "none of WAV, MP3, FLAC, OGG, M4A")


def _container(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return "mov" if data[8:12] == b"qt  " else "mp4"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in data[:64] else "mkv"
    return None


def _boxes_fill(data: bytes) -> bool:
    """Whether the top-level boxes of an MP4 end where the file does."""
    start = 0
    while start + 8 <= len(data):
        (size,) = struct.unpack_from(">I", data, start)
        if size == 1 and start + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, start + 8)
        if size == 0:  # up to the end
            return True
        if size < 8:
            return False
        start += size
    return start == len(data)
