"""Kernels of other packages: torch's 4-bit one on the CPU, and gptqmodel's layers as far as a CPU goes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients import client, run
from tests.formats.test_clients import GPTQMODEL
from tests.inference.test_load import random_qtensor
from torch.nn.functional import linear

import auto_round
from auto_round.errors import BackendError
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.inference.backends.exllamav2 import BACKEND as EXLLAMA
from auto_round.inference.backends.int4pack import BACKEND as INT4PACK
from auto_round.inference.backends.int4pack import nibbles
from auto_round.inference.backends.marlin import BACKEND as MARLIN
from auto_round.inference.base import Stored
from auto_round.inference.kernels.borrowed import Borrowed
from auto_round.inference.qlinear import QLinear
from auto_round.spec.scheme import Scheme

CPU, HALF = torch.device("cpu"), torch.bfloat16
SOURCE = Path(auto_round.__file__).parents[1]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("inputs", "group_size"), [(256, 32), (320, 64), (256, 128), (512, 256), (128, -1)])
def test_torch_s_kernel_gets_the_products(inputs: int, group_size: int, sym: bool) -> None:
    scheme = Scheme(4, group_size, sym)
    assert INT4PACK.supports(scheme, (48, inputs), HALF, CPU) is None
    tensor = random_qtensor(48, inputs, scheme, 0, seed=1)
    prepared = INT4PACK.prepare(Stored.of(tensor, GPTQ_RAW), HALF)
    assert prepared.qtensor().same(tensor)
    x, bias = torch.randn(2, 3, inputs).bfloat16(), torch.randn(48)
    y = INT4PACK.linear(x, prepared, bias)
    expected = linear(x.double(), tensor.dequantize(torch.float64), bias.bfloat16().double())
    assert y.dtype is HALF
    # Scales, zero points and the result are rounded to 2^-9 each.
    assert (y.double() - expected).norm() / expected.norm() < 2**-7


def test_the_last_tokens_of_a_batch_are_rows_of_their_own() -> None:
    """What a head is given while a batch is generated: a view whose rows lie a sample apart."""
    tensor = random_qtensor(48, 256, Scheme(4, 32), 0, seed=1)
    prepared = INT4PACK.prepare(Stored.of(tensor, GPTQ_RAW), HALF)
    hidden = torch.randn(3, 5, 256).bfloat16()
    y = INT4PACK.linear(hidden[:, -1:], prepared, None)
    assert torch.equal(y, INT4PACK.linear(hidden, prepared, None)[:, -1:])


def test_gradients_pass_through_a_borrowed_kernel() -> None:
    tensor = random_qtensor(16, 64, Scheme(4, 32), 0, seed=2)
    layer = QLinear.from_qtensor(tensor, GPTQ_RAW, INT4PACK, None, "layer")
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(3, -1))


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "message"),
    [
        (Scheme(3, 64), (64, 128), HALF, "no kernel for 3 bits"),
        (Scheme(4, 64), (64, 128), torch.float32, "load in bfloat16"),
        (Scheme(4, 64), (64, 100), HALF, "no groups of 64 in 100 inputs"),
        (Scheme(4, 64), (40, 128), HALF, "40 outputs are no multiple of 16"),
    ],
)
def test_torch_s_kernel_says_what_it_needs(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, message: str
) -> None:
    assert message in str(INT4PACK.supports(scheme, shape, dtype, CPU))


def test_cuda_s_bytes_hold_the_even_input_on_top() -> None:
    assert nibbles(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)).tolist() == [[0x12, 0x34]]


def test_a_kernel_with_wrong_products_is_refused_at_loading() -> None:
    tensor = random_qtensor(32, 64, Scheme(4, 32), 0, seed=3)
    weight = tensor.dequantize()
    stored = Stored.of(tensor, GPTQ_RAW)
    Borrowed.of("fine", stored, torch.float32, partial(linear, weight=weight))
    for wrong in (weight.roll(1, 0), weight.nan_to_num() * float("nan")):
        with pytest.raises(BackendError, match=r"'odd' gives wrong products on cpu .*W4A16G32.*backend='triton'"):
            Borrowed.of("odd", stored, torch.float32, partial(linear, weight=wrong))


@pytest.mark.parametrize("backend", [MARLIN, EXLLAMA], ids=lambda b: b.name)
def test_gptqmodel_s_kernels_are_for_cuda_and_can_be_installed(backend: Any) -> None:
    assert "it runs on CUDA devices, not on cpu" in str(backend.supports(Scheme(), (64, 128), HALF, CPU))
    reason = backend.supports(Scheme(), (64, 128), HALF, torch.device("cuda"))
    assert reason is not None
    assert reason.install == "pip install gptqmodel"


CODE = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from tests.inference.test_load import random_qtensor
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.inference.backends import exllamav2, marlin
from auto_round.inference.base import Stored
from auto_round.inference.kernels.borrowed import Borrowed
from auto_round.inference.kernels.gptqmodel import answer, filled, layer_class
from auto_round.spec.scheme import Scheme

plain = layer_class("torch", "TorchLinear")
for bits in (2, 4, 8):
    for sym in (True, False):
        for out, inputs, group in ((96, 256, 64), (64, 128, -1)):
            stored = Stored.of(random_qtensor(out, inputs, Scheme(bits, group, sym), 0, seed=bits), GPTQ_RAW)
            layer = filled(plain, stored, torch.float16)
            layer.qzero_format(2)
            layer.post_init()
            assert Borrowed.of("torch", stored, torch.float16, layer).qtensor().same(stored.qtensor())
cuda, half = torch.device("cuda"), torch.float16
kernels = {"marlin": layer_class(*marlin.LAYER), "exllamav2": layer_class(*exllamav2.LAYER)}
def said(name, scheme, shape=(4096, 4096)):
    return str(answer(kernels[name], scheme, shape, half, cuda))
assert "no kernel for 3 bits" in said("marlin", Scheme(3, 128))
assert "no kernel for 8 bits" in said("exllamav2", Scheme(8, 128))
assert "no zero points" in said("marlin", Scheme(4, 128, False))
assert "do not divide 576" in said("marlin", Scheme(4, 128), (64, 576))
assert "no groups of 16" in said("exllamav2", Scheme(4, 16))
for name in kernels:  # all else is right: what is missing is the device
    assert "CUDA" in said(name, Scheme(4, 128))
print("right")
"""


@pytest.mark.slow
def test_gptqmodel_reads_its_layers_from_our_codes() -> None:
    """Through its kernel in plain torch, which has the same buffers; those for CUDA are not even made without it."""
    python = client("gptqmodel", GPTQMODEL)
    assert run(python, CODE, SOURCE, Path(__file__).parents[2]).endswith("right\n")
