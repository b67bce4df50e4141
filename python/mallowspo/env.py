"""``python -m mallowspo.env``: what was built and what is found, for a bug report."""

import argparse
import importlib.metadata
import os
import platform

import torch

from mallowspo import _C

_PACKAGES = ("transformers", "datasets", "accelerate", "peft", "trl", "safetensors", "numpy")


def report():
    """Ordered facts, name -> text."""
    facts = {
        "mallowspo": _C.build["version"],
        "built with": f"{_C.build['compiler']}, torch {_C.build['built_with_torch']}",
        "CUDA kernels": f"{_C.build['cuda']} {_C.build['cuda_architectures']}".strip(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return facts | {package: installed(package) or "not installed" for package in _PACKAGES}


def installed(package):
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m mallowspo.env", description=__doc__).parse_args()
    for name, text in report().items():
        print(f"{name:13} {text}")
