"""The options of a recipe: dataclass fields, set by a YAML file and by the command line."""

import argparse
import json
import sys
from dataclasses import field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

# What the comparisons of every preset train beside the presets themselves.
COMPOSITIONS = (
    "mallows-theta+focal",
    "mallows-phi+focal",
    "mallows-theta+minor",
    "mallows-theta+js",
    "mallows-theta+wpo",
    "mallows-theta+bmc",
)


def config_field(script, name="default.yaml"):
    """The field ``config`` of a recipe's options; its default is the file of that name beside the script."""
    return field(default=str(Path(script).with_name(name)), metadata={"help": "YAML file of options."})


def list_field(*values, about):
    """A field whose default is a list of these values."""
    return field(default_factory=lambda: list(values), metadata={"help": about})


def check_at_least_one(options, *names):
    """ValueError for the first of the named numbers that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")


def parse_options(classes, description, arguments=None):
    """An instance of each dataclass from the YAML file of ``--config`` and the command line, which wins.

    Args:
        classes: dataclasses for ``transformers.HfArgumentParser``; one has a field ``config``, a path.
        description: the first line of ``--help``.
        arguments: the command line; default: ``sys.argv[1:]``.

    Raises:
        ValueError: the file is no mapping or has an unknown option. SystemExit: a value argparse refuses.
    """
    parser = HfArgumentParser(classes, description=description)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=parser.get_default("config"))
    path = finder.parse_known_args(arguments)[0].config
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' a line")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has unknown options: {', '.join(map(str, unknown))}; see --help")
    # Put before the command line, so that argparse converts and checks both in the same way, lists too.
    given = [text for name, value in options.items() if value is not None for text in _as_arguments(name, value)]
    given += sys.argv[1:] if arguments is None else arguments
    return parser.parse_args_into_dataclasses(given, look_for_args_file=False)


def _as_arguments(name, value):
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
