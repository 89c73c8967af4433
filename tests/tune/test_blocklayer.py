"""The tuning state of GGUF blocks: what it computes with is what the file will hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.errors import AutoRoundError
from auto_round.spec.blocks import BLOCK_SCHEMES, BlockScheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.blocklayer import BlockLayer
from auto_round.tune.moments import Moment
from auto_round.tune.start import inputs_from

CPU = torch.device("cpu")
TYPES = list(BLOCK_SCHEMES.values())


def weight(rows: int = 24, columns: int = 512) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def moment(columns: int = 512) -> Moment:
    """Inputs with a few strong directions and some noise, as those of language models have."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(900, 30, generator=g) @ torch.randn(30, columns, generator=g)
    inputs += 1.5 * torch.randn(900, columns, generator=g)
    return Moment(inputs.t() @ inputs / 900, 900)


def output_error(found: Tensor) -> float:
    return float(((found - weight()) @ moment().mean * (found - weight())).sum())


@pytest.mark.parametrize("kind", ["plain", "search", "compensated"])
@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_the_weight_that_is_tuned_is_the_weight_that_is_stored(scheme: BlockScheme, kind: str) -> None:
    layer, out = BlockLayer(weight(), scheme, kind, inputs_from(moment(), kind)), torch.empty(24, 512)
    for seed in range(3):
        layer.step(torch.randn(24, 512, generator=torch.Generator().manual_seed(seed)), 0.05, 0.01)
    layer.write_weight(out)
    assert torch.equal(layer.qtensor().dequantize(), out)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q4_1", "q4_0"])
def test_steps_lower_the_error_they_are_given_the_gradient_of(name: str) -> None:
    layer, out = (
        BlockLayer(weight(), BLOCK_SCHEMES[name], "search", inputs_from(moment(), "search")),
        torch.empty(24, 512),
    )
    layer.write_weight(out)
    before = best = output_error(out)
    for i in range(60):
        layer.step((out - weight()) @ moment().mean, 0.01 * (1 - i / 60), 0.001 * (1 - i / 60))
        layer.write_weight(out)
        best = min(best, output_error(out))
    assert best < 0.6 * before


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_1", "q5_1", "q6_k"])
def test_range_gradients_are_those_of_the_stored_weight(name: str) -> None:
    """Alpha moves against the derivative for the codes as they stand, beta against that of the weights out of range."""
    scheme = BLOCK_SCHEMES[name]
    layer = BlockLayer(weight(), scheme, "search", inputs_from(moment(), "search"))
    grad = torch.randn(24, 512, generator=torch.Generator().manual_seed(5))
    before = layer.multipliers.clone()
    layer.step(grad, 0.0, 1e-3)
    moved = layer.multipliers - before
    assert (moved[0] != 0).all()
    assert (moved[1] != 0).any() == (not scheme.sym)
    parts = layer.qtensor().fields()
    shifted = BlockLayer(weight(), scheme, "search", inputs_from(moment(), "search"))
    step, low = shifted.grid().step(), shifted.grid().low(scheme)
    level = ((shifted.weight + low) / step).round() + scheme.zero
    inside = ((level >= 0) & (level <= scheme.max_code)).float()
    code = level.clamp(0, scheme.max_code) - scheme.zero
    g = grad.view_as(step.expand_as(shifted.weight))
    by_step = (g * code).sum(-1, keepdim=True)
    by_d = (by_step * shifted.grid().scales).sum(2, keepdim=True) * shifted.grid().d
    sure = by_d.abs() > 1e-3 * by_d.abs().mean()
    assert torch.equal(torch.sign(moved[0])[sure], -torch.sign(by_d)[sure])
    if (not scheme.sym) and scheme.two_level:
        by_low = ((inside - 1) * g).sum(-1, keepdim=True)
        by_m = (by_low * shifted.grid().mins).sum(2, keepdim=True)
        sure = by_m.abs() > 1e-3 * by_m.abs().mean()
        assert torch.equal(torch.sign(moved[1])[sure], -torch.sign(by_m)[sure])
    assert parts.codes.max() <= scheme.max_code


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_better_starts_have_lower_output_error(scheme: BlockScheme) -> None:
    errors = [
        output_error(quantise_alone(weight(), scheme, kind, inputs_from(moment(), kind), CPU).dequantize())
        for kind in ("plain", "search", "compensated")
    ]
    assert errors[1] < (1.0 if scheme.bits < 6 else 1.2) * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = BLOCK_SCHEMES["q4_k"]
    whole = quantise_alone(weight(), scheme, "search", inputs_from(moment(), "search"), CPU)
    monkeypatch.setattr("auto_round.tune.alone.COMPENSATED_ROWS", 10)
    monkeypatch.setattr("auto_round.tune.passes.ROW_CHUNK", 1500)
    assert quantise_alone(weight(), scheme, "search", inputs_from(moment(), "search"), CPU).same(whole)


def test_nan_is_refused() -> None:
    bad = weight()
    bad[3, 5] = float("nan")
    with pytest.raises(AutoRoundError, match="NaN"):
        quantise_alone(bad, BLOCK_SCHEMES["q4_0"], "plain", None, CPU)
