"""Files that are there whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path, data):
    """Writes bytes to a path whose folder need not exist; a process that dies at any moment leaves the file as it was.

    Raises:
        OSError: disk full, no permission, a folder of that name; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # process ids repeat in containers
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise
