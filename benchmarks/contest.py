"""A contest: one piece of work done by mallowspo, by its competitors, and by the machine's limit for it.

Every benchmark file has a function ``contest(device, dtype, shape, case) -> Contest``. :func:`time_contest` times what
it returns in turn, round by round, in one process; ``memory.py`` measures the same contest in a process of its own.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SECONDS = 3.0  # of rounds for one contest
ROUNDS = 3, 15  # at least, at most
CALL_SECONDS = 2e-3  # shorter calls are timed many at a time
HEAD_START = 2**26  # cycles, some 40 ms, for which a CUDA device sleeps while the host queues what is timed
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the norm; some competitors sum in bfloat16


@dataclass
class Contest:
    """Contenders take no argument and return what they computed, limits aside all the same numbers.

    Attributes:
        ours: mallowspo.
        competitors: name -> the same result by somebody else, None where that is not installed.
        limits: name -> the least that any implementation has to do: its reads and writes, or its matrix products.
        prepare: untimed, before every single call, for contenders that overwrite their input.
        settle: whether an untimed call of the same contender comes before every timed one. Where page faults count:
            how many a call has depends on the memory that the call before it has freed.
        memory: whether the extra memory of this contest is worth the time of measuring it.
    """

    ours: Callable
    competitors: dict[str, Callable | None] = field(default_factory=dict)
    limits: dict[str, Callable] = field(default_factory=dict)
    prepare: Callable | None = None
    settle: bool = False
    memory: bool = False

    def contenders(self):
        """name -> function of everybody who is installed, limits too, ours first."""
        present = {name: run for name, run in self.competitors.items() if run is not None}
        return {"ours": self.ours, **present, **self.limits}


def optional(module):
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # it is installed, but broken
            raise
        return None


def synchronize(device):
    """Waits until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    """Seconds of one call, until its result is there."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def kernel_seconds(function, device, prepare=None, calls=1):
    """Seconds of one of `calls` calls in a row; on CUDA of the device alone, beside a host that runs ahead of it."""
    if prepare is not None:
        prepare()

    def run():
        for _ in range(calls):
            function()

    if device != "cuda":
        return seconds(run, device) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def time_contest(contest, device, benchmark):
    """{name: {"median", "low", "high"}} in seconds, low and high being the quartiles, and the number of rounds.

    pytest-benchmark times ours; its set-up, which it does not time, runs all the others once before each round, each
    round from another one on.
    """
    contenders = contest.contenders()
    warm_up(contest, device)
    times, calls = {}, {}

    def settle(run):
        if contest.settle:
            if contest.prepare is not None:
                contest.prepare()
            run()

    for name, run in contenders.items():
        settle(run)
        once = kernel_seconds(run, device, contest.prepare)
        calls[name] = 1 if contest.prepare else max(1, int(CALL_SECONDS / once))
        times[name] = [once] if calls[name] == 1 else []  # a round like the others, unless it was too short
    least, most = ROUNDS
    one_round = sum(values[0] if values else CALL_SECONDS for values in times.values())
    rounds = min(most, max(least, int(SECONDS / one_round))) - min(map(len, times.values()))

    def others():
        names = [name for name in contenders if name != "ours"]
        first = len(times["ours"]) % len(names) if names else 0
        for name in names[first:] + names[:first]:
            settle(contenders[name])
            times[name].append(kernel_seconds(contenders[name], device, contest.prepare, calls[name]))
        settle(contest.ours)
        if contest.prepare is not None:
            contest.prepare()
        synchronize(device)

    def ours():
        times["ours"].append(kernel_seconds(contest.ours, device, calls=calls["ours"]))

    benchmark.pedantic(ours, setup=others, rounds=rounds)
    return {name: spread(values) for name, values in times.items()}, min(map(len, times.values()))


def warm_up(contest, device):
    """Runs everybody once, which compiles, allocates and wakes threads, and holds their results against ours.

    Raises:
        AssertionError: a competitor computes something else; its time would mean nothing.
    """
    torch._dynamo.reset()  # recompilations of earlier contests do not count
    expected = None
    for name, run in contest.contenders().items():
        if contest.prepare is not None:
            contest.prepare()
        result = run()
        if name in contest.limits:
            continue
        tensors = [result] if torch.is_tensor(result) else list(result)
        if expected is None:
            expected = [tensor.detach().clone() for tensor in tensors]
            continue
        for theirs, ours in zip(tensors, expected, strict=True):
            tolerance = max(TOLERANCE[ours.dtype], TOLERANCE[theirs.dtype])
            error = ((theirs.float() - ours.float()).norm() / ours.float().norm()).item()
            assert error <= tolerance, f"{name} differs from ours by {error:.2g} of the norm, more than {tolerance}"
    synchronize(device)


def spread(values):
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
