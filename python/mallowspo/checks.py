"""What the functions of this package refuse in a tensor, with the sentence that says what to do instead."""

import torch

from mallowspo import _C

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HAS_CUDA_KERNELS = _C.build["cuda"].startswith("yes")


def check_tensor(name, tensor, dtypes):
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(tensor.dtype)[6:]}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {tensor.device}; mallowspo has kernels for cpu and cuda: move it there")
    if tensor.device.type == "cuda" and not HAS_CUDA_KERNELS:
        raise ValueError(
            f"{name} is on {tensor.device} but mallowspo was built without CUDA kernels ({_C.build['cuda']}); "
            "rebuild with nvcc on PATH and MALLOWSPO_CUDA=1"
        )


def check_same_device(**tensors):
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError("move to one device: " + ", ".join(f"{n} is on {t.device}" for n, t in tensors.items()))


def check_same_dtype(**tensors):
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise TypeError("cast to one dtype: " + ", ".join(f"{n} is {str(t.dtype)[6:]}" for n, t in tensors.items()))


def check_alike(**tensors):
    first, *others = (tensor.shape for tensor in tensors.values())
    if any(shape != first for shape in others):  # a set would need their hashes and fix torch.compile's symbolic sizes
        raise ValueError("shapes must agree: " + ", ".join(f"{n} is {list(t.shape)}" for n, t in tensors.items()))
    check_same_dtype(**tensors)
    check_same_device(**tensors)


def may_overlap(tensor):
    """Whether two entries may lie in one place; False is certain."""
    reach = 0  # of the entries along the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
