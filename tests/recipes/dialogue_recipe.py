"""What the dialogue recipe's tests share: its modules and small files."""

import importlib
import json
import sys
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "recipes" / "dialogue"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def import_recipe(*names):
    """The recipe's modules, whose plain names other recipes use too."""
    sys.path.insert(0, str(FOLDER))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


run, report, sources = import_recipe("run", "report", "sources")


def paper_options():
    return yaml.safe_load((FOLDER / "paper.yaml").read_text())


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
