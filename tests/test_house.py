"""Rules of the house that no linter knows."""

import ast
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "data_prep", "vlmcore")


def loaded_modules(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_vlmcore_loads_no_heavy_library():
    loaded = loaded_modules("import vlmcore, vlmcore.recipe, vlmcore.artifacts, vlmcore.errors")
    assert not loaded & {"prefect", "megatron", "torch", "torch.distributed", "transformers"}


def test_help_loads_no_heavy_library_and_is_instant():
    loaded = loaded_modules("import flows.cli")
    assert not loaded & {"prefect", "torch", "transformers", "pydantic", "vllm", "evalscope"}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flows", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - began < 5  # a gross guard; `make bench-demo` prints the figure


def test_a_cached_pipeline_is_planned_without_torch():
    loaded = loaded_modules("import flows.pipeline")
    assert not loaded & {"prefect", "torch", "transformers", "megatron"}


def modules_with_import(name: str) -> list[str]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                if any(one == name or one.startswith(f"{name}.") for one in names):
                    found.append(path.relative_to(ROOT).as_posix())
    return sorted(set(found))


def test_megatron_core_is_imported_only_in_its_rooms():
    rooms = ("vlmcore/models/", "vlmcore/training/", "vlmcore/megatron_cpu.py", "vlmcore/weights/")
    strays = [path for path in modules_with_import("megatron.core") if not path.startswith(rooms)]
    assert strays == []
