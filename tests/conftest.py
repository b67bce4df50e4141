"""Settings of every test: one thread, because the problems are tiny and the machine may be busy, and no deadlines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from mallowspo import linear  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("mallowspo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mallowspo")


@pytest.fixture(scope="module")
def no_progress_bars():
    """Of `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(params=["as torch multiplies", "in float32"])
def half_products(request, monkeypatch):
    """Both ways in which linear_token_stats multiplies half precision on a CPU, of which each machine takes one."""
    widened = {torch.bfloat16, torch.float16} if request.param == "in float32" else set()
    monkeypatch.setattr(linear, "WIDENED", widened)
