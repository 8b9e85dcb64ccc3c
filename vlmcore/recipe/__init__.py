"""The recipe: its schema, and how a file becomes one."""

from vlmcore.recipe.loading import find_recipe, list_recipes, load_recipe
from vlmcore.recipe.schema import Recipe

__all__ = ["Recipe", "find_recipe", "list_recipes", "load_recipe"]
