"""Found first on a child's PYTHONPATH (`vlmcore.compat.child_env`): remedies before any import."""

import contextlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

with contextlib.suppress(ModuleNotFoundError):  # a Python of another environment
    from vlmcore import compat

    compat.install()

# Python loads only the first sitecustomize that it finds, and this one stands before the others
here = Path(__file__).parent
spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if p and Path(p) != here])
if spec and spec.loader:
    spec.loader.exec_module(module_from_spec(spec))
