"""Which backend runs which layer: asked of the backends themselves, best first."""

from __future__ import annotations

import functools
import pkgutil
from typing import Any

import torch

from auto_round.errors import BackendError
from auto_round.inference import backends as package
from auto_round.inference.base import Backend, Reason
from auto_round.registry import Registry, did_you_mean
from auto_round.spec.scheme import Scheme

BACKENDS: Registry[Backend[Any]] = Registry(
    "backend",
    {m.name: f"{package.__name__}.{m.name}:BACKEND" for m in pkgutil.iter_modules(package.__path__)},
    BackendError,
)

# Spellings that mean "the best there is": ipex was a CPU library that is no longer developed.
BEST = ("auto", "ipex")
OWN_PREFIX = "auto_round"

# Backends that users know from other readers of these files, and what they need; used unless a backend answers to them.
ELSEWHERE = {
    "ark": "the kernels of the package auto-round-lib",
    "auto_round_kernel": "the kernels of the package auto-round-lib",
    "humming": "CUDA kernels of the package humming",
    "mlx": "the package mlx on Apple hardware",
    "hpu": "a Gaudi accelerator",
    "auto_gptq": "the kernels of the package auto-gptq",
    "auto_awq": "the kernels of the package autoawq",
}


@functools.cache
def ranked() -> tuple[Backend[Any], ...]:
    """All backends, best first."""
    return tuple(sorted((BACKENDS[name] for name in BACKENDS), key=lambda b: (-b.rank, b.name)))


def requested(spelling: str) -> tuple[Backend[Any], ...]:
    """The backends that a user's `spelling` allows, best first.

    "auto", a backend's name, or a family known from other readers such as "torch" or "auto_round:torch_zp". Raises
    BackendError for a family that is not here and, with the nearest names, for an unknown one.
    """
    name = spelling.strip().lower()
    prefix, _, kernel = name.partition(":")
    if prefix == OWN_PREFIX and kernel:
        name = prefix = kernel
    if name in BEST:
        return ranked()
    found = tuple(b for b in ranked() if name == b.name or name in b.spellings)
    if found:
        return found
    here = ", ".join(b.name for b in ranked())
    if prefix in ELSEWHERE or name.removesuffix("_zp") in ELSEWHERE:
        needs = ELSEWHERE.get(prefix) or ELSEWHERE[name.removesuffix("_zp")]
        raise BackendError(
            f"backend {spelling!r} is not available: it needs {needs}, which this version does not use. "
            f"Load with AutoRoundConfig(backend='auto'), which picks the best of: {here}"
        )
    known = ["auto", *(s for b in ranked() for s in (b.name, *b.spellings)), "ipex", *ELSEWHERE]
    raise BackendError(f"unknown backend {spelling!r}. {did_you_mean(name, known)}")


def explain(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Reason | None]:
    """For every backend, best first: why it cannot run a layer of shape (out, in), or None if it can."""
    return {b.name: b.supports(scheme, shape, dtype, device) for b in ranked()}


def choose(
    spelling: str, layer: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Backend[Any]:
    """Return the best backend that `spelling` allows and that can run the layer.

    Raises BackendError with every backend's reason when there is none; nothing is replaced silently by another.
    """
    reasons = []
    for backend in requested(spelling):
        reason = backend.supports(scheme, shape, dtype, device)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendError(
        f"layer {layer!r} ({scheme.name}, {shape[0]} x {shape[1]}, {dtype} on {device}) cannot be run by backend "
        f"{spelling!r}. {'. '.join(reasons)}. AutoRoundConfig(backend='auto') tries all backends"
    )


def choose_stored(
    spelling: str, layer: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> Backend[Any]:
    """Return the best backend that `spelling` allows and that computes from stored tensors, for an offloaded layer.

    Raises BackendError when `spelling` allows backends that repack only.
    """
    for backend in requested(spelling):
        if not backend.repacks and backend.supports(scheme, shape, dtype, torch.device("cpu")) is None:
            return backend
    raise BackendError(
        f"layer {layer!r} is offloaded, and backend {spelling!r} repacks weights at loading; load with "
        "AutoRoundConfig(backend='auto' or 'torch') or a device_map without offloaded buffers"
    )


def better_installed(
    chosen: Backend[Any], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return the command that installs the best backend above `chosen` that lacks nothing but software, or None."""
    for backend in ranked():
        if backend.rank <= chosen.rank:
            return None
        reason = backend.supports(scheme, shape, dtype, device)
        if reason is not None and reason.install is not None:
            return reason.install
    return None
