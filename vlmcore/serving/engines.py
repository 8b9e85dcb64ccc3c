"""The command line and environment that start each server engine, and the choice between them."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from vlmcore import compat
from vlmcore.errors import MissingExtraError
from vlmcore.families import FAMILIES, read_config
from vlmcore.recipe.schema import Serve

log = logging.getLogger(__name__)

Engine = Literal["vllm", "transformers"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
VLLM_ON_CPU = {
    # GiB; left out, vLLM takes most of the memory that is free
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # pinning fails in containers that hide the cores' topology
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # one process fewer that imports torch: 18 s to ready instead of 30 (2 cores, vLLM 0.32);
    # more than one rank still gets its own processes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def pick_engine(engine: Literal["auto", "vllm", "transformers"]) -> Engine:
    """`auto` resolved to what is installed; says why.

    Raises:
        MissingExtraError: vLLM is asked for by name and not installed.
    """
    installed = find_spec("vllm") is not None
    if engine == "auto":
        engine = "vllm" if installed else "transformers"
        log.info("serving with %s: vLLM is %sinstalled", engine, "" if installed else "not ")
    elif engine == "vllm" and not installed:
        raise MissingExtraError(
            "serve.engine is vllm, but vLLM is not installed: install the extra `cpu` or `gpu` "
            "(`pip install vlmflow[cpu]`), or set serve.engine to auto or transformers"
        )
    return engine


def command(
    engine: Engine, model_dir: Path, options: Serve, *, model_name: str, port: int
) -> list[str]:
    """What starts the server; it calls the model `sent_name(engine, …)`."""
    if engine == "vllm":
        return _vllm_command(model_dir, options, model_name=model_name, port=port)
    return _transformers_command(model_dir, options, port=port)


def sent_name(engine: Engine, model_dir: Path, *, model_name: str) -> str:
    """What a request has to name: transformers serve knows a model by its path alone."""
    return model_name if engine == "vllm" else str(model_dir)


def environment(engine: Engine) -> dict[str, str]:
    """Environment of the server; a variable that the user has set stays as it is."""
    defaults = VLLM_ON_CPU if engine == "vllm" and _is_cpu_build() else {}
    return {**defaults, **compat.child_env(), **OFFLINE}


def _is_cpu_build() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _vllm_command(model_dir: Path, options: Serve, *, model_name: str, port: int) -> list[str]:
    # the module behind `vllm serve`: that command asks for the version of a distribution named
    # vllm, which the CPU build, vllm-cpu, does not bring
    cmd = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    cmd += ["--model", str(model_dir), "--served-model-name", model_name]
    cmd += ["--host", options.host, "--port", str(port)]
    cmd += ["--dtype", options.dtype, "--max-model-len", str(options.max_model_len)]
    cmd += ["--limit-mm-per-prompt", json.dumps(options.limit_mm_per_prompt)]
    if options.enforce_eager:
        cmd.append("--enforce-eager")
    for name, value in {**_needed_args(model_dir), **options.extra_args}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            cmd.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            cmd += [f"--{flag}", str(value)]
    return cmd


def _needed_args(model_dir: Path) -> dict[str, str]:
    """Without which vLLM would build another model than the checkpoint's."""
    family = FAMILIES.get(read_config(model_dir).get("model_type", ""))
    needed = family.vllm_model_impl if family else None
    return {} if needed is None else {"model_impl": needed}


def _transformers_command(model_dir: Path, options: Serve, *, port: int) -> list[str]:
    if options.extra_args:
        log.warning("serve.extra_args are vLLM's: transformers serve does not get them")
    cmd = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_dir)]
    return [*cmd, "--host", options.host, "--port", str(port), "--dtype", options.dtype]
