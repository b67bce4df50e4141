"""The CUDA kernels' own source, run on host threads against the CPU kernels, under sanitizers.

tests/cuda_on_host says what this can show. It needs a compiler, which building the extension needed too, and no GPU.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "cuda_on_host"
SOURCES = [
    HERE / "main.cpp",
    *(ROOT / "csrc" / "cuda").glob("*.cu"),
    ROOT / "csrc" / "cpu" / "row_kernels.cpp",
    ROOT / "csrc" / "cpu" / "pairs.cpp",
]
FLAGS = (
    "-x c++ -std=c++20 -O1 -g -Wall -Wno-psabi -Wno-unknown-pragmas -fno-math-errno -ffp-contract=off -pthread".split()
)
DEFINES = ["-DMALLOWSPO_CUDA_ON_HOST", "-DMALLOWSPO_ISA=baseline", f"-I{HERE}"]


@pytest.mark.parametrize(
    ("sanitizers", "arguments"),
    [("address,undefined", []), ("thread", ["barriers"])],
    ids=["memory", "barriers"],
)
def test_kernels_on_the_host(tmp_path, sanitizers, arguments):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    program = tmp_path / "kernels"
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *FLAGS, *DEFINES, *sanitize, *SOURCES, "-o", program], check=True)
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok: " in result.stdout and "WARNING" not in result.stderr
