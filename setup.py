"""Builds fastmoe/_C with CMake and ninja where a compiler is at hand; without one the package installs and runs on
plain torch.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if os.environ.get("FASTMOE_NO_EXT") == "1":
            self.warn("FASTMOE_NO_EXT=1: the C++ extension is not built")
            return
        import pybind11

        build, target = Path("build/cmake"), Path(self.get_ext_fullpath(ext.name))
        configure = [
            "cmake",
            "-S",
            ".",
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)
            subprocess.run([sys.executable, "-c", "import _C"], cwd=build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"the C++ extension is not built ({error}); fastmoe will run on plain torch. "
                "Install a C++17 compiler and install again; `python -m fastmoe.collect_env` tells more."
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(next(build.glob("_C*.so"))), str(target))


class CudaSources(build_py):
    """Takes csrc/cuda along: the kernels are compiled at run time."""

    def run(self):
        super().run()
        target = Path(self.build_lib) / "fastmoe" / "csrc" / "cuda"
        if not self.editable_mode:
            self.mkpath(str(target))
            for source in Path("csrc/cuda").glob("*.cu"):
                self.copy_file(str(source), str(target / source.name))


setup(
    ext_modules=[Extension("fastmoe._C", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": CudaSources},
)
