"""Results of the stages of a long run, kept on disk: a second run goes on where the first one ended."""

import json
import os
import tempfile
from pathlib import Path

import xxhash

from mallowspo.files import write_whole


def digest(value):
    """A hash of anything JSON can hold; what it cannot counts by its text."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Stages:
    """A folder of results, each under its name and the hash of all it was computed from.

    A result appears there whole or not at all, so an interrupted stage leaves nothing that could be taken for one.
    """

    def __init__(self, folder):
        self._folder = Path(folder)

    def value(self, name, inputs, compute):
        """What ``compute()`` gives, anything JSON can hold, from the folder if it is there.

        Raises:
            ValueError: the file is corrupt.
        """
        key = digest(inputs)
        path = self._folder / f"{name}-{key[:12]}.json"
        if path.exists():
            try:
                kept = json.loads(path.read_bytes())
                sound = kept["key"] == key and kept["checksum"] == digest(kept["value"])
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise ValueError(f"the result of the stage {name} is corrupt; delete {path} to compute it again")
            print(f"{name}: kept from an earlier run")
            return kept["value"]
        value = json.loads(json.dumps(compute(), allow_nan=False))  # the same whether computed or read
        write_whole(path, json.dumps({"key": key, "checksum": digest(value), "value": value}).encode())
        return value

    def folder(self, name, inputs, compute):
        """The path of the folder that ``compute(folder)`` fills, once."""
        path = self._folder / f"{name}-{digest(inputs)[:12]}"
        if path.exists():
            print(f"{name}: kept from an earlier run")
            return path
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            filled = Path(temporary) / "filled"
            compute(filled)
            os.replace(filled, path)
        return path
