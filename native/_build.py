"""Builds the C core, for pip, for `python -m build` and, in place, for developers.

Responsible for: which C files and flags make `userswap.native._core`, and for an editable install
that type checkers can follow. The core is one abi3 extension: every native/*.c, plus the wrapper
that cffi writes from native/cdef/*.h (native/cdef/X.h says what Python sees of native/X.h).

Environment: USERSWAP_DEBUG=1 builds with the state checks (US_DEBUG) and little optimisation;
USERSWAP_SANITIZE=1 adds AddressSanitizer and UndefinedBehaviorSanitizer. `python native/_build.py`
rebuilds the core in place.
"""

import os
import shutil
from pathlib import Path

import setuptools
from cffi import FFI
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

NATIVE = Path("native")
SUBPACKAGES = ("engine", "backends", "native", "bench")
WARNINGS = ["-Wall", "-Wextra"]
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE=", "-g", "-fvisibility=hidden", "-pthread", *WARNINGS]
# What cffi writes is not ours to tidy.
WRAPPER_PRAGMAS = [
    '#pragma GCC diagnostic ignored "-Wunused-parameter"',
    '#pragma GCC diagnostic ignored "-Wunused-function"',
    '#pragma GCC diagnostic ignored "-Wmissing-field-initializers"',
    '#pragma GCC diagnostic ignored "-Wcast-function-type"',
]


def _files(pattern: str) -> list[str]:
    return sorted(str(path) for path in NATIVE.glob(pattern))


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _flavour() -> tuple[list[str], list[str]]:
    """The compiler's and the linker's flags for the build that the environment asks for."""
    compile_flags, link_flags = ["-O2"], ["-pthread"]
    if _switched_on("USERSWAP_DEBUG"):
        compile_flags = ["-O1", "-fno-omit-frame-pointer", "-UNDEBUG", "-DUS_DEBUG=1"]
    if _switched_on("USERSWAP_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        compile_flags += ["-U_FORTIFY_SOURCE", *sanitizers]
        link_flags += sanitizers
    return compile_flags, link_flags


class BuildCore(build_ext):
    """build_ext that finds the C files by itself and has cffi write the wrapper."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Time stamps cannot tell a debug build from a release build in the same build folder.
        self.force = True
        for extension in self.extensions:
            extension.sources = _files("*.c")
            extension.depends = _files("*.h") + _files("cdef/*.h")
            extension.include_dirs = [str(NATIVE)]
            extension.libraries = ["dl"]
            compile_flags, extension.extra_link_args = _flavour()
            extension.extra_compile_args = FLAGS + compile_flags

    def build_extension(self, extension: setuptools.Extension) -> None:
        wrapper = Path(self.build_temp, "_core.c")
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        declarations = [Path(name) for name in _files("cdef/*.h")]
        includes = [f'#include "{path.name}"' for path in declarations]
        ffi = FFI()
        ffi.cdef("\n".join(path.read_text() for path in declarations))
        ffi.set_source(extension.name, "\n".join(WRAPPER_PRAGMAS + includes))
        ffi.emit_c_code(str(wrapper))
        own_sources = extension.sources
        extension.sources = [str(wrapper), *own_sources]
        try:
            super().build_extension(extension)
        finally:
            extension.sources = own_sources  # an sdist must not name the generated file


class EditableLinks(editable_wheel):
    """An editable install made of links to folders instead of an import hook.

    Type checkers cannot see through an import hook, and links to single files would hide a new
    module until the next install.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.mode = "strict"

    def run(self) -> None:
        super().run()
        for package in Path("build").glob("__editable__.*/userswap"):
            for name in SUBPACKAGES:
                shutil.rmtree(package / name, ignore_errors=True)
                (package / name).unlink(missing_ok=True)
                (package / name).symlink_to(Path(name).resolve(), target_is_directory=True)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    setuptools.setup(script_args=["-q", "build_ext", "--inplace"])
