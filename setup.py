"""The extension modules and their directives; everything else about the package is in pyproject.toml.

PTEBATCH_DEBUG=1     checks bounds, None and uninitialised views; -O1 -g -DPTEBATCH_DEBUG, C asserts on
PTEBATCH_SANITIZE=1  AddressSanitizer and UBSan; such a module loads only with libasan preloaded (make test-all)
PTEBATCH_WERROR=1    a warning of the C compiler is an error

Each flavour is built in a tree of its own and says so in its version (0.1.0+debug), so that no two are taken for one
another. The build machine's CPU is never asked: SIMD variants are chosen at run time.
"""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup


def wanted(name):
    return os.environ.get(name, "") not in ("", "0")


debug, sanitize = wanted("PTEBATCH_DEBUG"), wanted("PTEBATCH_SANITIZE")
marks = ["debug"] * debug + ["sanitize"] * sanitize
tree = f"build/{'-'.join(marks) or 'release'}"

directives = {
    "language_level": 3,
    "embedsignature": True,
    "cdivision": True,  # in both builds: another arithmetic under test would be another program
    "wraparound": False,  # in both builds: a negative index is a bug, and boundscheck then reports it
    "boundscheck": debug,
    "initializedcheck": debug,
    "nonecheck": debug,
    # No overflowcheck: it refuses shifts that drop bits of an entry, which are meant, and raises without holding the
    # GIL. Signed overflow is for UBSan to find.
}

flags = ["-Wall", "-Wextra"]
flags += ["-O1", "-g", "-DPTEBATCH_DEBUG", "-UNDEBUG"] if debug else ["-O3"]
if sanitize:
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if wanted("PTEBATCH_WERROR"):
    flags += ["-Werror"]

extensions = [
    Extension(
        f"ptebatch.{os.path.basename(source).removesuffix('.pyx')}",
        [source],
        include_dirs=["ptebatch"],
        depends=sorted(glob("ptebatch/*.h")),
        extra_compile_args=flags,
        define_macros=[("PTEBATCH_CFLAGS", f'"{" ".join([*os.environ.get("CFLAGS", "").split(), *flags])}"')],
        extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
    )
    for source in sorted(glob("ptebatch/_*.pyx"))  # _core, and _measure: C kernels only bench and peers import
]

setup(
    ext_modules=cythonize(extensions, build_dir=f"{tree}/cython", compiler_directives=directives),
    options={"build": {"build_base": tree}, "egg_info": {"tag_build": f"+{'.'.join(marks)}" if marks else ""}},
)
