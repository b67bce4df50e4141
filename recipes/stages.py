"""Results of the stages of a long run, kept on disk: a second run goes on where the first one ended."""

import hashlib
import io
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from tqdm.auto import tqdm

from mallowspo.files import write_whole

CHECKSUM = "checksum"  # the file beside a folder's others that holds their hash


def digest(value):
    """A hash of anything JSON can hold; TypeError for what it cannot."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def folder_digest(folder):
    """A hash of the names and the bytes of all files below a folder, its checksum apart."""
    files = {}
    for path in Path(folder).rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUM:
            with path.open("rb") as file:
                files[name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return digest(files)


def write_checked(path, data):
    """Writes bytes behind the 16 of their checksum, whole or not at all."""
    write_whole(path, xxhash.xxh3_128_digest(data) + data)


def read_checked(path):
    """The bytes of :func:`write_checked`. Raises ValueError for a corrupt file."""
    kept = path.read_bytes()
    if xxhash.xxh3_128_digest(kept[16:]) != kept[:16]:
        raise _corrupt(path)
    return kept[16:]


class Stages:
    """A folder of results, each under its name and the hash of its inputs: all it was computed from, as JSON holds it.

    A result appears there whole or not at all, so an interrupted stage leaves nothing that could be taken for one.
    Methods raise ValueError for a corrupt file.

    Args:
        folder: made if missing. verbose: print the name of each result that an earlier run left.
    """

    def __init__(self, folder, verbose=False):
        self._folder, self._verbose = Path(folder), verbose
        self._folder.mkdir(parents=True, exist_ok=True)  # before the work, which a folder that cannot be would waste

    def value(self, name, inputs, compute):
        """What ``compute()`` gives, anything JSON can hold, without NaN."""
        key = digest(inputs)
        path = self._path(name, key, ".json")
        if not self._kept(name, path):
            value = json.loads(json.dumps(compute(), allow_nan=False))  # the same whether computed or read
            write_whole(path, json.dumps({"key": key, "checksum": digest(value), "value": value}).encode())
            return value
        try:
            kept = json.loads(path.read_bytes())
            sound = kept["key"] == key and kept["checksum"] == digest(kept["value"])
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise _corrupt(path)
        return kept["value"]

    def chunks(self, name, inputs, items, size, compute):
        """The results of items treated one by one: a value for each ``size`` of them, behind a progress bar.

        Args:
            compute: function of a list of items and the number of the first that returns a list as long.
        """
        results, quiet = [], Stages(self._folder)  # a line for each chunk would break the bar
        for start in tqdm(range(0, len(items), size), desc=name):
            chunk = items[start : start + size]
            results += quiet.value(name, [inputs, start, chunk], partial(compute, chunk, start))
        return results

    def arrays(self, name, inputs, compute):
        """What ``compute()`` gives, a dict of numpy arrays; the file is that of :func:`write_checked`, of an .npz."""
        path = self._path(name, digest(inputs), ".arrays")
        if not self._kept(name, path):
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **compute())
            write_checked(path, buffer.getvalue())
        with np.load(io.BytesIO(read_checked(path))) as arrays:
            return dict(arrays)

    def folder(self, name, inputs, compute):
        """The path of the folder that ``compute(folder)`` makes and fills; nothing in it may change later."""
        path = self._path(name, digest(inputs))
        if not self._kept(name, path):
            with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
                filled = Path(temporary) / "filled"
                compute(filled)
                (filled / CHECKSUM).write_text(folder_digest(filled))
                os.replace(filled, path)
        elif not (path / CHECKSUM).is_file() or (path / CHECKSUM).read_text() != folder_digest(path):
            raise _corrupt(path)
        return path

    def _path(self, name, key, ending=""):
        return self._folder / f"{name}-{key[:12]}{ending}"

    def _kept(self, name, path):
        kept = path.exists()
        if kept and self._verbose:
            print(f"{name}: kept from an earlier run")
        return kept


def _corrupt(path):
    return ValueError(f"{path} is corrupt; delete it to run the stage again")
