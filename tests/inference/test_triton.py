"""The Triton kernels on the CPU, through Triton's interpreter: right values, not speed, and not what a GPU compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.clients import client, run

import auto_round
from auto_round.inference.backends.triton import BACKEND
from auto_round.spec.scheme import Scheme

SOURCE = Path(auto_round.__file__).parents[1]
CODE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path[:0] = sys.argv[1:3]
import torch
from tests.inference.test_load import random_qtensor
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.inference.backends.triton import BACKEND
from auto_round.inference.base import Stored
from auto_round.inference.differentiable import differentiable_linear
from auto_round.inference.kernels.triton_linear import Words, triton_linear
from auto_round.spec.scheme import Scheme

for bits in (2, 3, 4, 8):
    for sym in (True, False):
        for out, inputs, group in ((96, 160, 64), (33, 100, 48), (64, 96, -1)):
            tensor = random_qtensor(out, inputs, Scheme(bits, group, sym), 0, seed=bits)
            words = Words.of(Stored.of(tensor, GPTQ_RAW))
            assert words.qtensor().same(tensor)
            for tokens, dtype in ((1, torch.float32), (1, torch.float16), (9, torch.float32), (33, torch.float16)):
                x = torch.randn(tokens, inputs).to(dtype)
                weight = tensor.dequantize(dtype).double()
                expected, size = x.double() @ weight.T, (x.double().square() @ weight.square().T).sum().sqrt()
                error = float((triton_linear(x, words).double() - expected).norm() / size)
                limit = {torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
                assert error < limit, (bits, sym, out, inputs, group, tokens, dtype, error)

x, kept = torch.randn(5, inputs, requires_grad=True), []
with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
    y = differentiable_linear(x, BACKEND, words, None)
y.sum().backward()
torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(5, -1))
assert kept == []
print("right")
"""


LARGE = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[1:2]
import torch
from auto_round.inference.kernels.triton_linear import _many

# Three tokens, 2^30 outputs: the third token's first product is element 2^31. Memory is given when it is touched.
outputs, tokens = 2**30, 3
x = torch.randn(tokens, 4).half()
words, scales = torch.full((64,), 0x04030201 + 0x80808080 - 2**32, dtype=torch.int32), torch.ones(64).half()
y = torch.empty((tokens - 1) * outputs + 64, dtype=torch.float16)
_many[(1, 1)](x, words, scales, scales, y, tokens, 4, outputs, 4, 8, True, bm=4, bk=4, bn=64)
for token in range(tokens):
    expected = x[token].float() @ torch.tensor([1.0, 2, 3, 4])
    assert abs(float(y[token * outputs]) - float(expected)) < 1e-2, token
print("right")
"""


@pytest.mark.slow
def test_more_than_two_to_the_31_products_have_places_of_their_own() -> None:
    assert run(client("triton", ["triton"]), LARGE, SOURCE).endswith("right\n")


DEVICES = """
import sys
from contextlib import nullcontext
from types import SimpleNamespace
sys.path[:0] = sys.argv[1:2]
import torch
from auto_round.inference.kernels.triton_linear import launching_on

entered = []
torch.get_device_module = lambda device: SimpleNamespace(device=lambda d: entered.append(d) or nullcontext())
with launching_on(torch.device("cpu")), launching_on(torch.device("cuda:1")), launching_on(torch.device("xpu:2")):
    print(*entered)
"""


@pytest.mark.slow
def test_a_launch_goes_to_the_device_of_its_tensors() -> None:
    """As far as that is to be seen without such a device."""
    assert run(client("triton", ["triton"]), DEVICES, SOURCE).endswith("cuda:1 xpu:2\n")


@pytest.mark.slow
def test_the_interpreter_gets_the_products_of_the_weights() -> None:
    python = client("triton", ["triton"])
    assert run(python, CODE, SOURCE, Path(__file__).parents[2]).endswith("right\n")


def test_it_says_what_it_needs() -> None:
    reason = BACKEND.supports(Scheme(), (64, 64), torch.bfloat16, torch.device("cpu"))
    assert "CUDA and XPU devices, not on cpu" in str(reason)
