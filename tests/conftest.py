"""Settings of every test: one thread, because the problems are tiny and the machine may be busy, and no deadlines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for the processes that tests start

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("mallowspo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mallowspo")
