"""The result of each stage in a file whose name says what it depends on: a run goes on where it was interrupted."""

import json
from functools import partial
from pathlib import Path

import xxhash
from tqdm.auto import tqdm

from mallowspo.files import write_whole


def cached(folder, stage, inputs, compute):
    """The result of a stage, from ``<folder>/<stage>-<hash of inputs>.json`` or computed and written there.

    Args:
        inputs: everything the result depends on, as JSON can hold it: other inputs are another file.
        compute: function without arguments; its result is what JSON can hold, without NaN.

    Raises:
        ValueError: the file is corrupt.
    """
    path = Path(folder) / f"{stage}-{hashed(json.dumps(inputs, sort_keys=True).encode())}.json"
    if not path.exists():
        data = json.dumps(compute(), allow_nan=False).encode()
        write_whole(path, hashed(data).encode() + b"\n" + data)
    checksum, _, data = path.read_bytes().partition(b"\n")
    if checksum != hashed(data).encode():
        raise ValueError(f"{path} is corrupt; delete it to run the stage again")
    return json.loads(data)


def hashed(data):
    """A short hash of bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def cached_chunks(folder, stage, inputs, items, size, compute):
    """The same for a stage that treats its items one by one, with a file for each ``size`` items and a progress bar.

    Args:
        compute: function of a list of items and the number of the first that returns a list as long.

    Returns:
        the list of all results.
    """
    results = []
    for start in tqdm(range(0, len(items), size), desc=stage):
        chunk = items[start : start + size]
        results += cached(folder, stage, {**inputs, "items": chunk, "start": start}, partial(compute, chunk, start))
    return results


def digest(model):
    """What identifies a model: a hash of the files of a folder, or the hub's name itself."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    state = xxhash.xxh3_64()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        state.update(path.name.encode())
        state.update(path.read_bytes())
    return state.hexdigest()
