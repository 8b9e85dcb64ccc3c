"""A recipe file, its bases and overrides become one `Recipe`, or one error listing all faults.

Later wins: the file over its `base:`, the overrides over the file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vlmcore.errors import RecipeError
from vlmcore.recipe.faults import explain
from vlmcore.recipe.schema import Recipe
from vlmcore.recipe.tree import Fault, Node, Where, dump, merge, parse, plain, put, recipe_error

RECIPES_DIR = Path(__file__).parents[2] / "deployments" / "recipes"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a name under deployments/recipes.

    Args:
        overrides: `train.full.learning_rate=1e-4`; list items by name or index, values as YAML.

    Raises:
        RecipeError: lists every fault with its file and line (or override), what was found, what
            was expected, and the remedy.
    """
    faults: list[Fault] = []
    tree = _read_with_bases(find_recipe(path), faults)
    for override in overrides:
        tree = _overridden(tree, override, faults)
    try:
        recipe = Recipe.model_validate(plain(tree))
    except ValidationError as error:
        raise recipe_error([*faults, *explain(error, tree)]) from None
    if faults:
        raise recipe_error(faults)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that loads as an equal recipe, every field spelled out."""
    return dump(recipe.model_dump(mode="json"))


def list_recipes() -> list[Path]:
    """The recipe files of the checkout, by name."""
    return sorted(RECIPES_DIR.glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file that a path, or the bare name of a recipe in deployments/recipes, stands for.

    Raises:
        RecipeError: there is no such file; names similar ones.
    """
    path = _resolved(name_or_path, Path())
    if not path.is_file():
        raise RecipeError(_no_file(path))
    return path


def _resolved(name_or_path: str | Path, folder: Path) -> Path:
    path = Path(name_or_path)
    if os.sep in str(name_or_path) or path.suffix:
        return folder / path.expanduser()
    return RECIPES_DIR / f"{name_or_path}.yaml"


def _no_file(path: Path) -> str:
    near = [p for p in path.parent.glob("*.y*ml") if p.is_file()]
    candidates = {p.name: p for p in [*list_recipes(), *near]}
    close = difflib.get_close_matches(path.name, candidates, cutoff=0.5)
    known = ", ".join(_shown(candidates[name]) for name in close or sorted(candidates))
    label = "similar" if close else "recipes here"
    return f"no recipe file at {_shown(path)}; {label}: {known or 'none'}"


def _shown(path: Path) -> str:
    path, here = Path(os.path.normpath(Path.cwd() / path)), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _read_with_bases(path: Path, faults: list[Fault], derived: tuple[Path, ...] = ()) -> Node:
    source = _shown(path)
    tree = parse(path.read_bytes(), lambda line: Where(source, line), faults)
    if not isinstance(tree.value, dict):
        text = "expected a mapping of fields such as name, model, data, train"
        raise recipe_error([*faults, Fault(tree.where, "", text)])
    base = tree.value.get("base")
    if base is None:
        return tree
    chain = (*derived, path.resolve())
    base_path = _base_path(base, path, faults)
    if base_path.resolve() in chain:
        loop = " → ".join(_shown(p) for p in (*chain, base_path))
        raise recipe_error([*faults, Fault(base.where, "base", f"leads back to itself: {loop}")])
    own = {name: node for name, node in tree.value.items() if name != "base"}
    return merge(_read_with_bases(base_path, faults, chain), Node(own, tree.where))


def _base_path(base: Node, path: Path, faults: list[Fault]) -> Path:
    if not isinstance(base.value, str):
        text = "expected the name of another recipe file, relative to this one"
        raise recipe_error([*faults, Fault(base.where, "base", text)])
    found = _resolved(base.value, path.parent)
    if not found.is_file():
        raise recipe_error([*faults, Fault(base.where, "base", _no_file(found))])
    return found


def _overridden(tree: Node, override: str, faults: list[Fault]) -> Node:
    where = Where(f"--set {override}")
    path, equals, text = override.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        expected = "expected PATH=VALUE, as in train.full.learning_rate=1e-4"
        faults.append(Fault(where, "", expected))
        return tree
    if steps[0] == "base":
        faults.append(Fault(where, "base", "a base is named in the file; write it there"))
        return tree
    value = parse(text, lambda _: where, faults)
    try:
        return put(tree, steps, value)
    except ValueError as error:
        faults.append(Fault(where, path.strip(), str(error)))
        return tree
