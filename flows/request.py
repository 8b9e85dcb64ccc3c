"""What a run is asked to do; the command line, the UI and the schedule all make one of these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vlmcore.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Request:
    """A loaded recipe, the store, and which stages to walk."""

    recipe: Recipe
    store: Path
    log_dir: Path
    refresh: tuple[str, ...] = ()
    start_from: str | None = None
    until: str | None = None


def default_store() -> Path:
    """`$VLMFLOW_STORE`, else `.vlmflow/store` in the working directory."""
    return Path(os.environ.get("VLMFLOW_STORE") or ".vlmflow/store")


def make_request(
    recipe: str,
    *,
    overrides: Sequence[str] = (),
    refresh: Sequence[str] = (),
    start_from: str = "",
    until: str = "",
    store: Path | str | None = None,
) -> Request:
    """Loads the recipe and fills in the defaults.

    Raises:
        RecipeError: The recipe or an override has faults.
    """
    loaded = load_recipe(recipe, overrides)
    root = Path(store) if store else default_store()
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{loaded.name}-{os.getpid()}"
    return Request(
        recipe=loaded,
        store=root,
        log_dir=root.parent / "logs" / stamp,
        refresh=tuple(refresh),
        start_from=start_from or None,
        until=until or None,
    )
