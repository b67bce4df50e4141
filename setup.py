"""Drives CMake for pip: everything about the native build is said in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        # cmake and ninja from the registry lie beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        for tool in ("cmake", "ninja"):
            if shutil.which(tool, path=path) is None:
                sys.exit(f"mallowspo: {tool} was not found; run: pip install {tool}")
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMALLOWSPO_OUTPUT={output}"]
        for command in (configure, ["cmake", "--build", build]):
            if subprocess.call(command, env={**os.environ, "PATH": path}):
                sys.exit("mallowspo: the native build failed; the first error above says why")

    def copy_extensions_to_source(self):  # an editable install: the operators' library goes along with _C
        super().copy_extensions_to_source()
        for library in Path(self.build_lib, "mallowspo").glob("libmallowspo.*"):
            self.copy_file(library, ROOT / "python" / "mallowspo" / library.name)


setup(ext_modules=[Extension("mallowspo._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
