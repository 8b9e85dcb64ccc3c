"""Donors by name: an HF id, `modelscope:ID`, `path:DIR` or `builtin:NAME` → a model folder."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

from vlmcore.errors import MissingExtraError, WeightError

log = logging.getLogger(__name__)

BUILTIN_VERSION = 1  # raise it when the output of a builder in builtin.py changes
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "merges*")


def donor_fingerprint(name: str) -> str:
    """What a donor is, without reading its weights: version, or sizes and times of its files.

    Raises:
        WeightError: Unknown builtin, or a folder that is not there.
    """
    scheme, rest = _split(name)
    if scheme == "builtin":
        return f"builtin:{rest}:{BUILTIN_VERSION}"
    if scheme == "path":
        files = sorted(path for path in _folder(rest).iterdir() if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()
    return name


def fetch_donor(name: str, target: Path, *, seed: int) -> None:
    """Puts a donor's files into `target`.

    Raises:
        WeightError: Unknown builtin, a folder that is not there, or a hub that cannot be reached.
    """
    scheme, rest = _split(name)
    target.mkdir(parents=True, exist_ok=True)
    if scheme == "builtin":
        from vlmcore.surgery.builtin import BUILTIN_DONORS

        if rest not in BUILTIN_DONORS:
            raise WeightError(
                f"builtin:{rest}: no such donor; there are "
                f"{', '.join(f'builtin:{known}' for known in sorted(BUILTIN_DONORS))}"
            )
        BUILTIN_DONORS[rest](target, seed=seed)
    elif scheme == "path":
        for path in sorted(_folder(rest).iterdir()):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    elif scheme == "modelscope":
        _download_from_modelscope(rest, target)
    else:
        _download(rest, target)


def donor_folder(name: str, scratch: Path, *, seed: int) -> Path:
    """A donor's folder: a local one as it stands, with or without `path:`; else a copy.

    Args:
        name: As in a recipe, or a folder.
        scratch: Where a donor that has to be fetched goes.
        seed: Of a builtin donor's weights.

    Raises:
        WeightError: As `fetch_donor`.
    """
    if Path(name).is_dir():
        return _folder(name)
    scheme, rest = _split(name)
    if scheme == "path":
        return _folder(rest)
    fetch_donor(name, scratch, seed=seed)
    return scratch


def local_donor(name: str) -> Path | None:
    """The folder of a donor that lies on this machine under its own name; None of others.

    Raises:
        WeightError: It is not there.
    """
    scheme, rest = _split(name)
    return _folder(rest) if scheme == "path" else None


def _split(name: str) -> tuple[str, str]:
    scheme, colon, rest = name.partition(":")
    return (scheme, rest) if colon else ("hf", name)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise WeightError(f"path:{name}: no config.json there; expected an HF model folder")
    return folder


def _download(name: str, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(name, local_dir=target, allow_patterns=list(_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise WeightError(
            f"{name}: cannot be fetched from the hub ({type(error).__name__}: {error}); check the "
            f"name, HF_TOKEN and HF_ENDPOINT, or give a local folder as path:DIR"
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _download_from_modelscope(name: str, target: Path) -> None:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"modelscope:{name} needs the package modelscope: pip install modelscope"
        ) from error
    try:
        snapshot_download(name, local_dir=str(target), allow_patterns=list(_WANTED))
    except (ValueError, OSError) as error:
        raise WeightError(
            f"modelscope:{name}: cannot be fetched ({type(error).__name__}: {error}); check the "
            f"name, or give a local folder as path:DIR"
        ) from error
