"""The modules of a recipe, which is a folder of scripts and no package."""

import importlib
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def import_recipe(recipe, *names):
    """The recipe's modules, whose plain names other recipes use too."""
    folders = [str(RECIPES / recipe), str(RECIPES)]
    sys.path[:0] = folders
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
