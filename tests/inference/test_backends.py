"""Every backend against the weights it stands for, over schemes, odd shapes and dtypes; and the native kernel's own."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import VOCABULARY, tiny_llama
from tests.inference.test_load import IDS, RAW, V1, logits, opened, random_qtensor, write_folder
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import auto_round
from auto_round.errors import BackendError, FormatError
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.inference.backends.native import BACKEND as NATIVE
from auto_round.inference.backends.torch_reference import BACKEND as TORCH
from auto_round.inference.base import Reason, Stored
from auto_round.inference.head import round_head
from auto_round.inference.kernels import native
from auto_round.inference.kernels.tiles import Tiles
from auto_round.inference.qlinear import QLinear
from auto_round.inference.select import ranked
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

CPU = torch.device("cpu")
SCHEMES = [Scheme(bits, 32, sym) for bits in (2, 3, 4, 8) for sym in (True, False)]
# (out, in, group size): several tiles and a short last group; one row; odd everything; groups cut in segments
SHAPES = [(96, 576, 128), (1, 64, 32), (33, 100, 48), (70, 29, 7), (40, 1000, -1), (64, 600, 256)]
# Of the relative error of a product. Half precision: weights and result may each be rounded to it.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}
# The native kernel does not round weights: the result's rounding, and its own error beside that.
NATIVE_TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 4.2e-3}

built = pytest.mark.skipif(isinstance(native.library(), Reason), reason="no C compiler when the package was installed")


def relative_error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Of y against x @ weight^T + bias, relative to its size if no terms cancelled; x, weight, bias: float64."""
    expected, size = x @ weight.t(), x.square() @ weight.square().t()
    if bias is not None:
        expected, size = expected + bias, size + bias.square()
    return float((y.double() - expected).norm() / size.sum().sqrt())


def layer_of(tensor: QTensor, backend: Any, bias: Tensor | None = None) -> QLinear:
    return QLinear.from_qtensor(tensor, GPTQ_RAW, backend, None if bias is None else nn.Parameter(bias), "layer")


def runnable() -> list[Any]:
    """(backend, scheme, shape, dtype): all that this machine's CPU can run."""
    found = []
    for backend, plain, shape, dtype in itertools.product(ranked(), SCHEMES, SHAPES, TOLERANCE):
        scheme = plain.updated({"group_size": shape[2]})
        if backend.supports(scheme, shape[:2], dtype, CPU) is None:
            name = f"{backend.name}-{scheme.name}-{shape}-{dtype}"
            found.append(pytest.param(backend, scheme, shape, dtype, id=name))
    return found


@pytest.mark.parametrize(("backend", "scheme", "shape", "dtype"), runnable())
def test_products_are_those_of_the_weights(
    backend: Any, scheme: Scheme, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    out_features, in_features, _ = shape
    tensor = random_qtensor(out_features, in_features, scheme, 0, seed=1)
    weight = tensor.dequantize(torch.float64)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(out_features, generator=generator)
    prepared = backend.prepare(Stored.of(tensor, GPTQ_RAW), dtype)
    assert prepared.qtensor().same(tensor)
    for tokens in (1, 5, 67):
        x = torch.randn(tokens, in_features, generator=generator).to(dtype)
        x[0, ::7] *= 30  # outliers
        with torch.no_grad():
            y = backend.linear(x, prepared, bias.to(dtype))
            plain = backend.linear(x[None], prepared, None)
        assert y.dtype is dtype
        assert plain.shape == (1, tokens, out_features)
        assert relative_error(plain[0], x.double(), weight) < TOLERANCE[dtype]
        assert relative_error(y, x.double(), weight, bias.to(dtype).double()) < TOLERANCE[dtype]


@built
@pytest.mark.parametrize("isa", range(len(native.INSTRUCTION_SETS)), ids=native.INSTRUCTION_SETS.__getitem__)
@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
def test_every_instruction_set_gives_the_same(isa: int, dtype: torch.dtype) -> None:
    """Sums within a segment are integers, so only the last float additions could differ."""
    found = native.library()
    assert isinstance(found, native.Library)
    if isa not in found.isas:
        pytest.skip(f"this CPU has no {native.INSTRUCTION_SETS[isa]}")
    for scheme in SCHEMES:
        for out_features, in_features, group_size in SHAPES:
            tensor = random_qtensor(out_features, in_features, scheme.updated({"group_size": group_size}), 0, seed=3)
            for tokens in (1, 4, 11):
                x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(4)).to(dtype)
                y = native.native_linear(x, Tiles.of(tensor), None, isa)
                assert relative_error(y, x.double(), tensor.dequantize(torch.float64)) < NATIVE_TOLERANCE[dtype]


@built
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("zero", ["lowest", "highest"])
def test_the_largest_sums_fit(bits: int, sign: float, zero: str) -> None:
    """Every code, zero point and activation of a segment at the end of its range."""
    found = native.library()
    assert isinstance(found, native.Library)
    most = 2**bits - 1
    code, point = (most, 0) if zero == "lowest" else (0, most)
    codes, zeros = torch.full((32, 128), code, dtype=torch.uint8), torch.full((32, 1), point, dtype=torch.uint8)
    tensor = QTensor(codes, torch.ones(32, 1).half(), zeros, Scheme(bits, 128, sym=False))
    for isa, dtype, tokens in itertools.product(found.isas, native.DTYPES, (1, 2, 3)):
        y = native.native_linear(torch.full((tokens, 128), sign, dtype=dtype), Tiles.of(tensor), None, isa)
        expected = torch.full_like(y, sign * (code - point) * 128, dtype=torch.float64)
        torch.testing.assert_close(y.double(), expected, rtol=NATIVE_TOLERANCE[dtype], atol=0)


@built
def test_the_operator_s_twin_and_fake() -> None:
    tiles = Tiles.of(random_qtensor(70, 100, Scheme(3, 48, sym=False), 0, seed=5))
    x, bias = torch.randn(2, 3, 100), torch.randn(70)
    y = native.operator_linear(x, tiles, bias)
    torch.testing.assert_close(y, native.reference_linear(x, tiles, bias), atol=1e-5, rtol=1e-5)
    arguments = (x, tiles.codes, tiles.scales, tiles.zeros, bias, 3, 48, 70, 100)
    torch.library.opcheck(torch.ops.auto_round.tiles_linear.default, arguments, rtol=1e-4, atol=1e-4)


@built
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", list(native.DTYPES), ids=str)
def test_what_is_not_finite_stays_so_in_its_own_token(bad: float, dtype: torch.dtype) -> None:
    tiles = Tiles.of(random_qtensor(32, 256, Scheme(4, 128), 0, seed=7))
    x = torch.randn(2, 256).to(dtype)
    x[1, 200] = bad
    y = native.native_linear(x, tiles, None)
    assert bool(torch.isfinite(y[0]).all())
    assert bool(torch.isnan(y[1]).all())


@built
def test_zeros_and_numbers_near_the_ends_of_float32() -> None:
    tensor = random_qtensor(32, 128, Scheme(4, 32), 0, seed=8)
    tiles = Tiles.of(tensor)
    assert torch.equal(native.native_linear(torch.zeros(1, 128), tiles, None), torch.zeros(1, 32))
    assert bool((native.native_linear(torch.full((1, 128), 1e-42), tiles, None) == 0).all())
    for size in (1e-25, 1e30):
        x = torch.randn(1, 128) * size
        y = native.native_linear(x, tiles, None)
        assert relative_error(y, x.double(), tensor.dequantize(torch.float64)) < TOLERANCE[torch.float32]
    assert native.native_linear(torch.empty(0, 128), tiles, None).shape == (0, 32)


def test_tiles_hold_the_float16_scales_that_the_kernel_reads() -> None:
    tensor = random_qtensor(32, 64, Scheme(4, 32), 0, seed=9)
    with pytest.raises(FormatError, match=r"scales have dtype torch\.float32"):
        Tiles.of(dataclasses.replace(tensor, scales=tensor.scales.float()))


@built
def test_threads_do_not_interfere() -> None:
    layers = [layer_of(random_qtensor(96, 320, Scheme(b, 64), 0, seed=b), NATIVE) for b in (2, 3, 4, 8)]
    x = torch.randn(3, 320)
    expected = [layer(x) for layer in layers]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(layers[index % 4](x), expected[index % 4]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@built
def test_a_whole_model_packed_compiled_and_saved_again(tmp_path: Path) -> None:
    dense = tiny_llama()
    write_folder(tmp_path / "first", dense, Scheme(4, 64, sym=False), RAW)
    model = opened(tmp_path / "first")
    assert {m.backend.name for m in model.modules() if isinstance(m, QLinear)} == {"native"}
    assert not [name for name, _ in model.named_buffers() if "qweight" in name]
    torch.testing.assert_close(logits(model), logits(dense), atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(logits(opened(tmp_path / "second")), logits(model))


@built
def test_a_compiled_graph_holds_the_operator() -> None:
    layer = layer_of(random_qtensor(64, 96, Scheme(4, 32), 0, seed=6), NATIVE, torch.randn(64))
    x = torch.randn(2, 96)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, layer(x))
    trained, eager = (torch.randn(2, 96, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab")
    torch.compile(layer, fullgraph=True, backend="aot_eager")(trained).square().sum().backward()
    layer(eager).square().sum().backward()
    torch.testing.assert_close(trained.grad, eager.grad)


@built
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_graph_holds_the_operator() -> None:
    layer = layer_of(random_qtensor(64, 96, Scheme(4, 32), 0, seed=6), NATIVE, torch.randn(64))
    traced = torch.jit.trace(layer, torch.randn(2, 96))
    x = torch.randn(3, 96)
    assert torch.equal(traced(x), layer(x))
    assert "auto_round::tiles_linear" in str(traced.graph)


@built
def test_a_layer_that_no_backend_runs_elsewhere_says_so_when_it_is_moved() -> None:
    layer = layer_of(random_qtensor(64, 96, Scheme(4, 32), 0, seed=6), NATIVE)
    with pytest.raises(BackendError, match="'layer' cannot go to the meta device"):
        layer.to("meta")
    layer.asked = "native"
    with pytest.raises(
        BackendError, match=r"'layer' .*native: it runs on CPUs, not on cuda; load with device_map='cpu'"
    ):
        layer._move(torch.device("cuda"))
    assert layer(torch.randn(1, 96)).shape == (1, 64)


@built
def test_a_head_in_eight_bits_is_near_and_is_not_saved_as_the_file_s(tmp_path: Path) -> None:
    dense = tiny_llama()
    write_folder(tmp_path, dense, packing=V1)
    exact = logits(opened(tmp_path))
    model = opened(tmp_path, quantization_config=auto_round.AutoRoundConfig(lm_head_bits=8))
    assert model.lm_head.inner.scheme == Scheme(8, 128)
    difference = (logits(model) - exact).norm() / exact.norm()
    assert 0 < float(difference) < 1e-2
    with pytest.raises(BackendError, match="lm_head_bits"):
        model.save_pretrained(tmp_path / "again")


@built
def test_a_head_in_eight_bits_has_the_dtype_that_models_ask_it_for(tmp_path: Path) -> None:
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=VOCABULARY)
    dense = MambaForCausalLM(config).eval()
    block = "backbone.layers.0.mixer"
    others = {f"{block}.in_proj": Scheme(4, 32), f"{block}.x_proj": None, f"{block}.dt_proj": None}
    write_folder(tmp_path, dense, Scheme(4, 32), others={**others, f"{block}.out_proj": Scheme(4, 32)})
    model = opened(tmp_path, torch.bfloat16, quantization_config=auto_round.AutoRoundConfig(lm_head_bits=8))
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert logits(model).shape == (*IDS.shape, VOCABULARY)


def test_a_head_is_prepared_for_the_dtype_that_its_backend_was_chosen_for(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    class Halves(type(NATIVE)):  # type: ignore[misc]
        """As Marlin, it takes no float32."""

        def supports(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
            return None if dtype is torch.bfloat16 else Reason("no float32", "load in bfloat16")

        def prepare(self, stored: Stored, dtype: torch.dtype) -> Tiles:
            prepared.append(dtype)
            return Tiles.of_stored(stored)

    monkeypatch.setattr("auto_round.inference.select.ranked", lambda: (Halves(),))
    assert round_head(tiny_llama().bfloat16(), 8, GPTQ_RAW, "auto") == "native"
    assert prepared == [torch.bfloat16]


@built
def test_a_tied_head_in_eight_bits_leaves_the_embedding(tmp_path: Path) -> None:
    dense = tiny_llama(tie_word_embeddings=True)
    write_folder(tmp_path / "first", dense)
    model = opened(tmp_path / "first", quantization_config=auto_round.AutoRoundConfig(lm_head_bits=8))
    model.save_pretrained(tmp_path / "second")
    again = opened(tmp_path / "second")
    torch.testing.assert_close(logits(again), logits(opened(tmp_path / "first")))


def test_without_the_kernel_torch_takes_over_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Reason("the native kernel was not built", "install a compiler", native.REINSTALL)
    monkeypatch.setattr("auto_round.inference.backends.native.library", lambda: missing)
    write_folder(tmp_path, tiny_llama())
    with caplog.at_level("INFO", "auto_round"):
        model = opened(tmp_path)
    assert model.model.layers[0].mlp.up_proj.backend is TORCH
    expected = f"14 layers W4A16G64 with torch_reference on cpu; faster after: {native.REINSTALL}"
    assert [r.message for r in caplog.records] == [expected]
    with pytest.raises(BackendError, match="lm_head_bits=8 needs a compiled backend"):
        opened(tmp_path, quantization_config=auto_round.AutoRoundConfig(lm_head_bits=8))
    assert logits(model).shape == (*IDS.shape, logits(model).shape[-1])
