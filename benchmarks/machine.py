"""Facts of the machine and the software that the figures belong to."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from mallowspo import env

# What the row kernels and torch's own kernels choose their instruction set by, and what makes bfloat16 products fast.
FLAGS = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16 amx_bf16 asimd sve".split()


def facts(device):
    """Ordered facts, name -> text."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "CPU model": cpu_model(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "instruction sets": " ".join(flag for flag in FLAGS if flag in _cpu_flags()) or "unknown",
        "threads": str(torch.get_num_threads()),
        **env.report(),
        **{name: env.installed(name) or "not installed" for name in ("liger-kernel", "triton")},
        "git commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def name(device):
    """Names a results file: what was measured on, without the date, so that a later run replaces it."""
    if device == "cuda":
        text = f"cuda {torch.cuda.get_device_name()}"
    else:
        # Some clouds give one name to processors of several generations.
        text = f"cpu {cpu_model()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}c"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model():
    """The processor's own name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def git_commit():
    """The commit of this tree, marked where the tree differs from it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _cpu_flags():
    return (_cpuinfo("flags") or _cpuinfo("Features")).split()


def _cpuinfo(key):
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
