"""The modules of a recipe, which is a folder of scripts and no package; the reviews' archive in small."""

import importlib.util
import io
import sys
import tarfile
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


def hide_package(monkeypatch, hidden):
    """As if a package were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name))


def tar_of(files):
    """The bytes of a .tar.gz of {name: bytes}."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()
