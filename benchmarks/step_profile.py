"""Where the time of one of our training steps goes."""

import time
from contextlib import contextmanager

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from contest import synchronize

STEPS = 3
REFERENCE, BACKBONE, HEAD, OPTIMISER = "reference", "backbone, forward", "head, forward", "clipping and optimiser"
BACKBONE_BACKWARD, HEAD_BACKWARD, OTHER = "backbone, backward", "head, backward", "other"
_NODE = "autograd::engine::evaluate_function: "  # what the profiler calls a node of the backward pass


def seconds_by_part(step, device):
    """{part: seconds a step} of a warm :class:`trainers.Step` of MallowsTrainer, by torch.profiler.

    On CUDA a part's time is that of its kernels, and "other" has what no kernel fills.
    """
    models = [step.trainer.model, step.trainer.ref_model]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with _ranges([model for model in models if model is not None]), profile(activities=activities) as profiler:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronize(device)
        total = time.perf_counter() - start
    parts = dict.fromkeys((REFERENCE, BACKBONE, HEAD, BACKBONE_BACKWARD, HEAD_BACKWARD, OPTIMISER), 0.0)
    for event in profiler.key_averages():
        name = _part(event.key)
        if name in parts and event.device_type == DeviceType.CPU:
            parts[name] += 1e-6 * (event.device_time_total if device == "cuda" else event.cpu_time_total)
    parts[OTHER] = total - sum(parts.values())
    return {name: value / STEPS for name, value in parts.items()}


def _part(key):
    if not key.startswith(_NODE):
        return key
    return HEAD_BACKWARD if "LinearTokenStats" in key else BACKBONE_BACKWARD


@contextmanager
def _ranges(models):
    """Names the calls of each model's backbone and head for the profiler."""
    handles = []
    for model in models:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for module, name in ((base.get_decoder(), BACKBONE), (base.get_output_embeddings(), HEAD)):
            handles += _name_calls(module, name)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name_calls(module, name):
    running = []

    def enter(*_):
        running.append(record_function(name if torch.is_grad_enabled() else REFERENCE))
        running[-1].__enter__()

    def leave(*_):
        running.pop().__exit__(None, None, None)

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
