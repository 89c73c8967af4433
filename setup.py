"""The compiled parts of the package; all else is in pyproject.toml. Without a C compiler it installs all the same."""

from setuptools import Extension, setup

SHARED = "src/auto_round/runtime"  # of the header that all parts include
HEADERS = [f"{SHARED}/compiled.h", "src/auto_round/calibrate/attention_tiles.h"]


def part(library: str, file: str, *flags: str) -> Extension:
    """A library of plain C that is called through ctypes, beside its Python module."""
    source = "/".join(["src", *library.split(".")[:-1], file])
    flags = ("-O3", "-g0", f"-I{SHARED}", *flags)
    return Extension(library, [source], extra_compile_args=list(flags), depends=HEADERS, optional=True)


setup(
    ext_modules=[
        part("auto_round.inference.kernels._native", "native.c"),
        part("auto_round.calibrate._attention", "attention.c"),
        # Rounded after every operation, as torch does it.
        part("auto_round.tune._passes", "passes.c", "-ffp-contract=off", "-fno-math-errno"),
        part("auto_round.tune._columns", "columns.c", "-ffp-contract=off"),
    ]
)
