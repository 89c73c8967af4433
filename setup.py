"""The compiled part of the package; all else is in pyproject.toml. Without a C compiler it installs all the same."""

from setuptools import Extension, setup

KERNELS = "auto_round.inference.kernels"

setup(
    ext_modules=[
        Extension(
            f"{KERNELS}._native",  # plain C, called through ctypes: see kernels/native.py
            [f"src/{KERNELS.replace('.', '/')}/native.c"],
            extra_compile_args=["-O3", "-g0"],
            optional=True,
        )
    ]
)
