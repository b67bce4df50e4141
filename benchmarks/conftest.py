"""Times an implementation and its competitors in turn, round by round, in one process.

The machine may be shared: only figures of one run, taken in turn, compare. pytest-benchmark times ours; its set-up,
which it does not time, runs every competitor once before each round, and their medians are kept in `extra_info`.
"""

import statistics
import subprocess
import sys
import time

import pytest


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def in_turn(benchmark):
    """``in_turn(ours, {name: competitor})`` -> {name: median seconds}, ours under "ours"."""

    def run(ours, others, rounds=7):
        times = {name: [] for name in others}

        def set_up():
            for name, other in others.items():
                times[name].append(seconds(other))

        benchmark.pedantic(ours, setup=set_up, rounds=rounds, warmup_rounds=1)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is the warm-up
        benchmark.extra_info["seconds"] = {"ours": benchmark.stats.stats.median, **medians}
        return benchmark.extra_info["seconds"]

    return run


@pytest.fixture
def peak_memory():
    """``peak_memory(set_up, code)`` -> MiB by which `code` raises the peak of a fresh process after `set_up`."""

    def run(set_up, code):
        script = (
            "import resource, torch\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            f"{set_up}\nbefore = peak()\n{code}\nprint(peak() - before)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return float(result.stdout.split()[-1])

    return run
