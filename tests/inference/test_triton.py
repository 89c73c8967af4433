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
from auto_round.inference.base import Stored
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
print("right")
"""


@pytest.mark.slow
def test_the_interpreter_gets_the_products_of_the_weights() -> None:
    python = client("triton", ["triton"])
    assert run(python, CODE, SOURCE, Path(__file__).parents[2]).endswith("right\n")


def test_it_says_what_it_needs() -> None:
    reason = BACKEND.supports(Scheme(), (64, 64), torch.bfloat16, torch.device("cpu"))
    assert "CUDA and XPU devices, not on cpu" in str(reason)
