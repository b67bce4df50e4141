"""What the dialogue recipe's tests share: its modules and small files."""

import json

import yaml
from load_recipe import RECIPES, import_recipe

FOLDER = RECIPES / "dialogue"
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


run, report, sources, models = import_recipe("dialogue", "run", "report", "sources", "models")


def paper_options():
    return yaml.safe_load((FOLDER / "paper.yaml").read_text())


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
