"""The native build: what it decides, what it refuses, and that the CUDA kernels compile, link and register."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATORS = ("token_stats", "preference_loss", "mallows_log_prob")


def run(command, **environment):
    bin_dir = str(Path(sys.executable).parent)
    env = {k: v for k, v in os.environ.items() if k not in ("MALLOWSPO_CUDA", "CUDACXX", "CXX")}
    env = {**env, "PATH": os.pathsep.join([bin_dir, env["PATH"]]), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def configure(build, source=ROOT, **environment):
    command = ["cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    return run([*command, f"-DMALLOWSPO_OUTPUT={build}/mallowspo"], **environment)


def refusal(result):
    """The sentence of a refused configuration, with CMake's line breaks taken out."""
    assert result.returncode != 0, result.stdout
    text = " ".join(result.stderr.split())
    return text[text.index("mallowspo:") :]


def stub_torch(directory, version, cuda=None):
    """A package that calls itself torch of another version, and nothing else."""
    package = directory / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "class Version(str):\n"
        "    def __lt__(self, other): return [int(x) for x in self.split('.')] < [int(x) for x in other.split('.')]\n"
        f"__version__ = Version('{version}')\n"
        f"version = SimpleNamespace(cuda={cuda!r})\n"
    )
    return str(directory)


def path_without(*names):
    """A PATH of links to every program on PATH but the named ones."""

    def make(directory):
        for folder in reversed(os.environ["PATH"].split(os.pathsep)):
            for program in Path(folder).glob("*"):
                link = directory / program.name
                if not any(program.name.startswith(name) for name in names) and not link.is_symlink():
                    link.symlink_to(program)
        return str(directory)

    return make


def test_decision_is_printed_and_kept(tmp_path):
    result = configure(tmp_path, MALLOWSPO_CUDA="0")
    assert "CUDA kernels: no: forbidden by MALLOWSPO_CUDA=0" in result.stdout
    from mallowspo import _C

    assert _C.build["cuda"].startswith(("yes: ", "no: "))


def test_bad_cuda_wish_is_refused(tmp_path):
    assert "MALLOWSPO_CUDA is 'maybe'; set it to 1" in refusal(configure(tmp_path, MALLOWSPO_CUDA="maybe"))


def test_forced_cuda_without_nvcc_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    path = path_without("nvcc")(tmp_path / "bin")
    result = configure(tmp_path / "build", MALLOWSPO_CUDA="1", PATH=path, CUDA_PATH="", CUDA_HOME="")
    assert "nvcc was not found; install the CUDA toolkit" in refusal(result)


def test_missing_compiler_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    path = path_without("c++", "g++", "clang", "CC", "x86_64-linux-gnu-g++", "aarch64-linux-gnu-g++")(tmp_path / "bin")
    assert "no C++ compiler was found; install GCC 12" in refusal(configure(tmp_path / "build", PATH=path))


def test_a_compiler_that_fails_is_shown_failing(tmp_path):
    text = refusal(configure(tmp_path, CXXFLAGS="--bogus"))
    assert "Check CXX and CXXFLAGS" in text and "unrecognized command-line option" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH that could fail")
@pytest.mark.parametrize("wish", ["1", ""])
def test_an_nvcc_that_fails_is_not_left_out(tmp_path, wish):
    stub = stub_torch(tmp_path, "2.13.0", cuda="13.0")
    text = refusal(configure(tmp_path / "build", PYTHONPATH=stub, MALLOWSPO_CUDA=wish, CUDAHOSTCXX="/usr/bin/false"))
    assert "CUDAHOSTCXX, or set MALLOWSPO_CUDA=0" in text and "CUDA compiler" in text


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0"])
def test_old_torch_is_refused_when_building(tmp_path, version):
    result = configure(tmp_path / "build", PYTHONPATH=stub_torch(tmp_path, version), MALLOWSPO_CUDA="0")
    assert f"torch {version} is too old" in refusal(result)
    assert "pip install 'torch>=2.10'" in refusal(result)


def test_old_torch_is_refused_at_import(tmp_path):
    result = run(
        [sys.executable, "-c", "import mallowspo"],
        PYTHONPATH=os.pathsep.join([stub_torch(tmp_path, "2.9.1"), str(ROOT / "python")]),
    )
    assert "ImportError: mallowspo needs torch 2.10 or newer, found 2.9.1" in result.stderr
    assert "run: pip install 'torch>=2.10'" in result.stderr


def test_the_least_torch_is_the_declared_one():
    import mallowspo

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = f"torch>={mallowspo.MINIMUM_TORCH}"
    assert wanted in declared["project"]["dependencies"] and wanted in declared["build-system"]["requires"]


def test_what_is_imported_is_declared():
    """By the trainer and below; integrations and extras are imported where they are asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    imported = set()
    for path in (ROOT / "python" / "mallowspo").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names - {"mallowspo"} == declared


@pytest.mark.parametrize("kind", ["No module named 'torch'", "libtorch.so: cannot open"])
def test_a_torch_that_does_not_import_is_refused_with_its_own_words(tmp_path, kind):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f'raise ImportError("{kind}")')
    message = refusal(configure(tmp_path / "build", PYTHONPATH=str(tmp_path), MALLOWSPO_CUDA="0"))
    assert "cannot import torch; run: pip install 'torch>=2.10'" in message and f"ImportError: {kind}" in message


def test_a_release_candidate_is_reported_as_one(tmp_path):
    for name in ("CMakeLists.txt", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    project = re.sub(r'(?m)^version = ".*"$', 'version = "0.2.0rc1"', (ROOT / "pyproject.toml").read_text())
    (tmp_path / "pyproject.toml").write_text(project)
    result = configure(tmp_path / "build", tmp_path, MALLOWSPO_CUDA="0")
    assert "-- mallowspo 0.2.0rc1: torch" in result.stdout, result.stderr
    assert 'MALLOWSPO_VERSION=\\\\\\"0.2.0rc1' in (tmp_path / "build" / "compile_commands.json").read_text()


def test_a_package_without_its_extension_says_so(tmp_path):
    shutil.copytree(ROOT / "python", tmp_path / "python", ignore=shutil.ignore_patterns("*.so", "*.dylib"))
    result = run([sys.executable, "-c", "import mallowspo"], PYTHONPATH=str(tmp_path / "python"))
    assert result.returncode != 0
    assert "ImportError: the native extension of mallowspo is not built; run: pip install ." in result.stderr


def test_dir_lists_the_lazy_exports():
    import mallowspo

    assert {*mallowspo.__all__, "MallowsTrainer", "preset"} <= {*dir(mallowspo)}
    assert all(getattr(mallowspo, name) is not None for name in dir(mallowspo))


def test_type_checkers_see_the_lazy_exports():
    import mallowspo

    (block,) = (node for node in ast.parse(Path(mallowspo.__file__).read_text()).body if isinstance(node, ast.If)
                and ast.unparse(node.test) == "TYPE_CHECKING")  # fmt: skip
    found = {a.asname: n.module for n in block.body for a in n.names if a.asname == a.name}  # so they are re-exported
    assert found == {name: f"mallowspo.{module}" for name, module in mallowspo._EXPORTS.items()}
    assert Path(mallowspo.__file__).with_name("py.typed").exists()


def test_a_source_distribution_has_all_that_the_build_needs(tmp_path, monkeypatch):
    """Made from a copy, in which setuptools may leave what it likes."""
    copy = tmp_path / "copy"
    left_out = (".*", "build", "build-*", "outputs", "*.egg-info", "__pycache__", "*.so", "*.dylib")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    monkeypatch.chdir(copy)
    result = run([sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist('{tmp_path}')"])
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("mallowspo-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    for folder in ("csrc", "python/mallowspo"):
        found, wanted = ({path.relative_to(top) for path in (top / folder).rglob("*")} for top in (source, copy))
        assert found == wanted
    assert not (source / "tests").exists()  # they need recipes, pages and benchmarks too
    result = configure(tmp_path / "build", source, MALLOWSPO_CUDA="0")
    assert result.returncode == 0, result.stderr


def test_a_failed_build_says_why_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path]
    result = run(command, CXX="none")
    first, *_, last = result.stderr[result.stderr.index("CMake Error") :].strip().split("\n\n")
    assert result.returncode != 0 and "specified in the environment variable CXX" in first
    assert last.strip() == "mallowspo: the native build failed; the first error above says why"


def test_functional_needs_torch_alone():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['transformers', 'datasets', 'accelerate', 'peft']));"
    result = run([sys.executable, "-c", blocked + "import mallowspo.functional as F; print(len(F.LINKS) > 0)"])
    assert result.stdout.strip() == "True", result.stderr


def test_env_report():
    result = run([sys.executable, "-m", "mallowspo.env"])
    assert result.returncode == 0 and "CUDA kernels" in result.stdout and "torch" in result.stdout
    result = run([sys.executable, "-m", "mallowspo.env", "all"])
    assert result.returncode == 2 and not result.stdout and "unrecognized arguments: all" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA kernels cannot be compiled here")
def test_cuda_kernels_compile_link_and_register(tmp_path):
    """One library with CPU and CUDA inside, built against whatever torch is here, loads and lists its CUDA kernels."""
    result = configure(tmp_path, MALLOWSPO_CUDA="1")
    assert result.returncode == 0 and "CUDA kernels: yes: nvcc" in result.stdout, result.stderr
    commands = (tmp_path / "compile_commands.json").read_text()
    for target in ("code=[sm_80]", "code=[compute_90,sm_90]"):  # compute_90 is PTX, for devices yet to come
        assert commands.count(target) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    result = run(["cmake", "--build", str(tmp_path)])
    assert result.returncode == 0 and "warning" not in result.stdout, result.stdout  # such as of a host's function
    code = (
        "import torch, _C\n"
        "print(_C.build['cuda_architectures'])\n"
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('mallowspo::')]\n"
        f"assert {{'mallowspo::' + n for n in {OPERATORS}}} < set(names)\n"
        "assert all(torch._C._dispatch_has_kernel_for_dispatch_key(n, 'CUDA') for n in names)\n"
        "logits = torch.randn(3, 5)\n"
        "stats = torch.ops.mallowspo.token_stats(logits, torch.tensor([0, 1, 2]), -100, 1.0)\n"
        "assert torch.allclose(stats[0], logits.log_softmax(-1).diagonal())\n"
    )
    result = run([sys.executable, "-c", code], PYTHONPATH=str(tmp_path / "mallowspo"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["80-real", "90"]


def test_device_tests_are_rehearsed():
    """Without a GPU the device's tests at least go through every call they make, with the CPU in its place."""
    tests = [ROOT / "tests" / "test_cuda.py", "-m", "cuda", "-k", "not widths", "-q", "-p", "no:cacheprovider"]
    result = run([sys.executable, "-m", "pytest", *tests], MALLOWSPO_CUDA_TESTS_ON="cpu")
    assert result.returncode == 0, result.stdout


def test_the_stream_of_torch_is_found(tmp_path):
    """Python loads a library so that nobody else sees its names; a CUDA torch or a stand-in must be found even so."""
    (tmp_path / "probe.cpp").write_text(
        '#include "cuda/stream.h"\n'
        'extern "C" void* found() { return reinterpret_cast<void*>(mallowspo::cuda::find_current_stream()); }\n'
    )
    (tmp_path / "stub.cpp").write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }\n'
    )
    torch = Path(importlib.util.find_spec("torch").origin).parent
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    options = ["-std=c++17", "-shared", "-fPIC"]
    probe, stub = tmp_path / "probe.so", tmp_path / "libtorch_cuda.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{torch / 'include'}"]
    for command in (
        [compiler, *options, *includes, tmp_path / "probe.cpp", "-ldl", "-o", probe],
        [compiler, *options, tmp_path / "stub.cpp", "-Wl,-soname,libtorch_cuda.so", "-o", stub],
    ):
        result = run(command)
        assert result.returncode == 0, result.stderr
    code = (
        "import ctypes, torch\n"
        f"probe = ctypes.CDLL('{probe}')\n"
        "probe.found.restype = ctypes.c_void_p\n"
        "assert bool(probe.found()) == (torch.version.cuda is not None)\n"
        f"stub = torch.version.cuda or ctypes.CDLL('{stub}', mode=ctypes.RTLD_LOCAL)\n"
        "assert probe.found()\n"
    )
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr


ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(ARM_COMPILER is None, reason="no compiler for ARM: apt-get install g++-aarch64-linux-gnu")
def test_row_kernels_compile_to_neon(tmp_path):
    """Compiled, not run. The flags are those of the build, less the instruction sets of x86."""
    listed = next(line for line in (ROOT / "CMakeLists.txt").read_text().splitlines() if "set(kernel_flags" in line)
    flags = listed.removeprefix("set(kernel_flags ").removesuffix(")").split()
    source, assembly = ROOT / "csrc" / "cpu" / "row_kernels.cpp", tmp_path / "row_kernels.s"
    command = [ARM_COMPILER, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", *flags]
    result = run([*command, "-DMALLOWSPO_ISA=baseline", "-S", source, "-o", assembly])
    assert result.returncode == 0, result.stderr
    assert "fmla\tv" in assembly.read_text()
