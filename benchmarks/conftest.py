"""Options, and the fixture that runs a contest; at the end of the run, the table and its files."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import machine  # noqa: E402
import memory  # noqa: E402
import ratios  # noqa: E402
from contest import time_contest  # noqa: E402
from mallowspo.functional import HAS_CUDA_KERNELS  # noqa: E402

# Beyond its limit of recompilations torch.compile would run the plain function, timed as if it were compiled.
torch._dynamo.config.fail_on_recompile_limit_hit = True

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("mallowspo")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one and it has kernels")
    group.addoption("--all-shapes", action="store_true", help="the slow shapes too (always on cuda)")
    group.addoption("--results", metavar="FOLDER", help="where to keep the table; default: it is only printed")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes on two cores; --all-shapes runs it")
    config.stash[ROWS] = []


def device_of(config):
    """The device the run measures."""
    device = config.getoption("--device")
    if device == "cuda" and not (torch.cuda.is_available() and HAS_CUDA_KERNELS):
        raise pytest.UsageError("--device cuda needs a CUDA device and mallowspo built with CUDA kernels")
    return device or ("cuda" if torch.cuda.is_available() and HAS_CUDA_KERNELS else "cpu")


def pytest_collection_modifyitems(config, items):
    if device_of(config) == "cuda" or config.getoption("--all-shapes"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def compare(request, benchmark):
    """``compare(contest, dtype, shape, case)``: times it, measures its memory, adds its row to the table."""
    device = device_of(request.config)

    def run(make, dtype, shape, case):
        contest = make(device, dtype, shape, case)
        spreads, rounds = time_contest(contest, device, benchmark)
        measures_memory = contest.memory
        row = {
            "kernel": make.__module__.removeprefix("test_"),
            "shape": shape,
            "dtype": dtype,
            "case": case,
            "rounds": rounds,
            "ours": spreads["ours"],
            "competitors": {name: spreads.get(name) for name in contest.competitors},
            "limits": {name: spreads[name] for name in contest.limits},
        }
        del contest  # the process that measures the memory needs its room
        row["extra_memory_mib"] = (
            memory.in_subprocess(make.__module__, device, dtype, shape, case) if measures_memory else None
        )
        request.config.stash[ROWS].append(row)
        show_progress(request.config, row)

    return run


def show_progress(config, row):
    """One line a finished row; the table follows at the end."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    heading, cells = ratios.table([row])
    figures = (f"{name} {cell}" for name, cell in zip(heading[4:], cells[4:], strict=True))
    with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"{', '.join(cells[:4])}: {'; '.join(figures)} ({row['rounds']} rounds)")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    device = device_of(config)
    terminalreporter.section("ratios")
    terminalreporter.write_line(ratios.LEGEND + "\n\n" + ratios.markdown_table(ratios.table(rows)) + "\n")
    folder = config.getoption("--results")
    if folder and exitstatus == pytest.ExitCode.OK:
        results = {"schema": ratios.SCHEMA, "facts": machine.facts(device), "rows": rows}
        for path in ratios.write(results, folder, machine.name(device)):
            terminalreporter.write_line(f"wrote {path}")
    elif folder:
        terminalreporter.write_line(f"the run is not complete: what {folder} holds stays as it is")
