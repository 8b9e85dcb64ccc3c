import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmcore import compat
from vlmcore.compat.image_decoding import decode_image

needs_remedy = pytest.mark.skipif(
    not compat.torchvision_ops.needed(), reason="the real torchvision loads here"
)


def run(code: str, *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_imports_no_library() -> None:
    loaded = (
        "import sys; from vlmcore import compat; compat.install(); print('torch' in sys.modules)"
    )
    assert run(loaded) == "False"


@needs_remedy
def test_torchvision_cannot_be_imported_without_the_remedy() -> None:
    """Once this fails, the remedy has become needless."""
    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, check=False
    )
    assert b"torchvision::nms does not exist" in done.stderr


def test_transformers_decodes_an_image_after_install(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png")
    code = (
        "from vlmcore import compat; compat.install(); compat.install()\n"
        "from transformers.image_utils import load_image_as_tensor\n"
        f"print(load_image_as_tensor({str(tmp_path / 'image.png')!r}).tolist())"
    )
    assert run(code) == "[[[1, 4]], [[2, 5]], [[3, 6]]]"


def test_a_child_and_its_child_can_import_torchvision() -> None:
    inner = "import torchvision, sys; print(torchvision.__name__)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    assert run(code, env=compat.child_env()) == "torchvision"


@needs_remedy
def test_child_env_is_the_same_when_taken_twice() -> None:
    once = compat.child_env({"PYTHONPATH": "/elsewhere"})
    assert once["PYTHONPATH"].split(os.pathsep)[1:] == ["/elsewhere"]
    assert compat.child_env(once) == once


@needs_remedy
def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.marker = 'ran'")
    env = compat.child_env({**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run("import sys; print(sys.marker)", env=env) == "ran"


@needs_remedy
def test_an_audio_package_that_cannot_load_counts_as_absent() -> None:
    code = "import importlib.util as u; print(u.find_spec('torchaudio'))"
    assert run(code, env=compat.child_env()) == "None"


def write_image(path: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.arange(1, 7, dtype=np.uint8).reshape(1, 2, 3)).save(path)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("GRAY", 1), ("UNCHANGED", 3)])
def test_an_image_is_decoded_in_the_mode_asked_for(
    tmp_path: Path, mode: str, channels: int
) -> None:
    import torch

    write_image(tmp_path / "image.png")
    encoded = torch.frombuffer(bytearray((tmp_path / "image.png").read_bytes()), dtype=torch.uint8)
    image_CHW = decode_image(encoded, mode)
    assert image_CHW.shape == (channels, 1, 2)
    assert image_CHW.dtype == torch.uint8
