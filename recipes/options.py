"""The options of a recipe: dataclass fields, set by a YAML file and by the command line."""

import argparse
import functools
import inspect
import json
import math
import sys
from dataclasses import field
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


def config_field(script, name="default.yaml"):
    """The field ``config`` of a recipe's options; its default is the file of that name beside the script."""
    return field(default=str(Path(script).with_name(name)), metadata={"help": "YAML file of options."})


def list_field(*values, about):
    """A field whose default is a list of these values."""
    return field(default_factory=lambda: list(values), metadata={"help": about})


def check_at_least_one(options, *names):
    """ValueError for the first of the named numbers, or lists of numbers, that is below 1."""
    _check(options, names, "at least 1", lambda number: number >= 1)


def check_positive(options, *names):
    """ValueError for the first of the named numbers, or lists of numbers, that is not positive and finite."""
    _check(options, names, "positive and finite", lambda number: 0 < number < math.inf)


def check_not_negative(options, *names):
    """ValueError for the first of the named numbers, or lists of numbers, that is negative or not finite."""
    _check(options, names, "finite and at least 0", lambda number: 0 <= number < math.inf)


def _check(options, names, wanted, is_meant):
    for name in names:
        value = getattr(options, name)
        if not all(map(is_meant, value if isinstance(value, list) else [value])):
            raise ValueError(f"{name} must be {wanted}, got {value}")


def ends_the_script(parse):
    """A function that reads options whose ValueError ends a script with its message alone, as argparse's errors do.

    Where ``arguments`` are given in place of the command line it is raised.
    """
    signature = inspect.signature(parse)

    @functools.wraps(parse)
    def parsed(*args, **options):
        try:
            return parse(*args, **options)
        except ValueError as error:
            if signature.bind(*args, **options).arguments.get("arguments") is not None:
                raise
            sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")

    return parsed


@ends_the_script
def parse_options(classes, description, arguments=None):
    """An instance of each dataclass from the YAML file of ``--config`` and the command line, which wins.

    ``null`` in the file is None. No option can be abbreviated.

    Args:
        classes: dataclasses for ``transformers.HfArgumentParser``; one has a field ``config``, a path.
        description: the first line of ``--help``.
        arguments: the command line; default: ``sys.argv[1:]``.

    Raises:
        ValueError: the file cannot be read, is no mapping, names an option twice, has an unknown one or a ``null`` for
            one that cannot be None; the command line has an unknown one. SystemExit: a value argparse refuses, and
            for any of these where the options are those of a script, see :func:`ends_the_script`.
    """
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=parser.get_default("config"))
    path = finder.parse_known_args(arguments)[0].config
    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the options of --config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' a line")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has unknown options: {', '.join(map(str, unknown))}; see --help")
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    nulls = [name for name, value in options.items() if value is None]
    for name in nulls:
        if type(None) not in get_args(hints[name]):
            raise ValueError(f"{path} has null for {name}, which must have a value; leave it out for its default")
    parser.set_defaults(**dict.fromkeys(nulls))
    # Put before the command line, so that argparse converts and checks both in the same way, lists too.
    given = [text for name, value in options.items() if value is not None for text in _as_arguments(name, value)]
    given += sys.argv[1:] if arguments is None else arguments
    return parser.parse_args_into_dataclasses(given, look_for_args_file=False)


class _Loader(yaml.SafeLoader):
    """Refuses a name that a mapping has twice, of which YAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice")
        return super().construct_mapping(node, deep)


def _as_arguments(name, value):
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
