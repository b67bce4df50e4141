"""``python memory.py MODULE DEVICE DTYPE SHAPE CASE``: extra memory of every contender of a contest, as JSON in MiB.

The extra is the peak during one call less what was held before it: temporaries, results and gradients, but not the
inputs. Each contender has called once before, so that neither compilation nor a library's own start counts. A process
of its own, in which every allocation from 64 KiB on goes back to the system when freed: what one contender leaves
behind cannot serve the next. The CPU's peak is Linux's VmHWM, which can be reset; elsewhere nothing is measured.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measurable(device):
    """Whether this machine tells the peak."""
    return device == "cuda" or RESET.exists()


def extra_memory(run, device):
    """MiB by which one call of `run` raises the memory of the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    RESET.write_text("5")  # sets the peak to what is resident now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def in_subprocess(module, *arguments):
    """{contender: MiB} of a contest, measured by this file in a process of its own; None where that is impossible."""
    if not measurable(arguments[0]):
        return None
    return json_of([sys.executable, __file__, module, *arguments])


def json_of(command):
    """The last line that a Python process prints, as JSON; in it, freed memory goes back to the system."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    contest = importlib.import_module(sys.argv[1]).contest(*sys.argv[2:])
    extra = {}
    for name, run in contest.contenders().items():
        if name in contest.limits:
            continue
        for _ in range(2):  # the second counts
            if contest.prepare is not None:
                contest.prepare()
            extra[name] = extra_memory(run, sys.argv[2])
    print(json.dumps(extra))
