"""Layers of the package gptqmodel (7.7 here), which compiles its CUDA sources when a kernel is first asked for.

Its layers hold GPTQ's words: qweight int32 (in*b/32, out), qzeros int32 (in/g, out*b/32), scales float16 (in/g, out).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from auto_round.inference.base import Reason, Stored
from auto_round.numerics.bitpack import pack
from auto_round.spec.scheme import Scheme

INSTALL = "pip install gptqmodel"
INSTEAD = "use triton or torch_reference"


def refusal(
    kind: str, name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Reason | None:
    """Say why gptqmodel's layer `name` of its module `kind` cannot take a layer of shape (out, in); None if it can.

    The package itself is asked, with the device it would run on.
    """
    if device.type != "cuda":
        return Reason(f"it runs on CUDA devices, not on {device.type}", "use native, or load with device_map='cuda'")
    if find_spec("gptqmodel") is None:
        return Reason("the package gptqmodel is not installed", "install it", INSTALL)
    try:
        layer = layer_class(kind, name)
    except ImportError as error:
        return Reason(f"the package gptqmodel does not work here ({error})", "install it anew", INSTALL)
    return answer(layer, scheme, shape, dtype, device)


def answer(
    layer: Any, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Reason | None:
    """What the layer class says of a shape (out, in)."""
    width = scheme.group_width(shape[1])
    if shape[1] % width:
        return Reason(f"groups of {width} do not divide {shape[1]} inputs", INSTEAD)
    if scheme.bits not in layer.SUPPORTS_BITS:
        return Reason(f"it has no kernel for {scheme.bits} bits", INSTEAD)
    if width not in layer.SUPPORTS_GROUP_SIZE and scheme.group_size != -1:
        return Reason(f"it has no groups of {width}", INSTEAD)
    if scheme.sym not in layer.SUPPORTS_SYM:
        return Reason("it has no zero points", INSTEAD)
    ok, error = layer.validate(
        bits=scheme.bits,
        group_size=scheme.group_size,
        desc_act=False,
        sym=scheme.sym,
        in_features=shape[1],
        out_features=shape[0],
        pack_dtype=torch.int32,
        dtype=dtype,
        device=device,
    )
    return None if ok else Reason(str(error), INSTEAD)


def layer_class(kind: str, name: str) -> Any:
    """Class `name` in gptqmodel.nn_modules.qlinear.`kind`."""
    from importlib import import_module

    return getattr(import_module(f"gptqmodel.nn_modules.qlinear.{kind}"), name)


def filled(layer: Any, stored: Stored, dtype: torch.dtype) -> Any:
    """An instance of the layer class with the codes of `stored`, before the package's own `post_init`."""
    tensor, scheme = stored.qtensor(), stored.scheme
    module = layer(
        bits=scheme.bits,
        group_size=scheme.group_size,
        desc_act=False,
        sym=scheme.sym,
        in_features=stored.in_features,
        out_features=stored.out_features,
        bias=False,
        pack_dtype=torch.int32,
        dtype=dtype,
        register_buffers=True,
    )
    device, width = tensor.codes.device, scheme.group_width(stored.in_features)
    values = {
        "qweight": pack(tensor.codes, scheme.bits).t().contiguous(),
        "qzeros": pack(tensor.zero_points().t(), scheme.bits),
        "scales": tensor.scales.t().contiguous().to(module.scales.dtype),
        "g_idx": torch.arange(stored.in_features, dtype=torch.int32, device=device) // width,
    }
    for name, value in values.items():
        parameter = isinstance(getattr(module, name), torch.nn.Parameter)
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False) if parameter else value)
    return module
