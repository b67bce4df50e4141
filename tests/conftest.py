"""Settings of every test: one thread, because the problems are tiny and the machine may be busy, and no deadlines."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("mallowspo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mallowspo")
