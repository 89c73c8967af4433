from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.errors import AutoRoundError
from auto_round.spec.scheme import Scheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.layer import TunedLayer
from auto_round.tune.moments import Moment
from auto_round.tune.start import inputs_from, make_start

CPU = torch.device("cpu")
SCHEMES = [Scheme(bits, group, sym=sym) for bits in (2, 3, 4, 8) for group in (-1, 32, 40) for sym in (True, False)]


def weight(rows: int = 64, columns: int = 96) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def moment(columns: int = 96) -> Moment:
    """Inputs with a few strong directions and some noise, as those of language models have."""
    g = torch.Generator().manual_seed(1)
    strong = torch.randn(512, 6, generator=g) @ torch.randn(6, columns, generator=g)
    inputs = strong + 0.5 * torch.randn(512, columns, generator=g)
    return Moment(inputs.t() @ inputs / 512, 512)


def tuned(scheme: Scheme, kind: str) -> TunedLayer:
    start = make_start(weight(), scheme, kind, inputs_from(moment(), kind) if kind != "plain" else None)
    return TunedLayer(weight(), scheme, start, searched=kind != "plain")


@pytest.mark.parametrize("kind", ["plain", "search", "compensated"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_the_weight_that_is_tuned_is_the_weight_that_is_stored(scheme: Scheme, kind: str) -> None:
    layer, out = tuned(scheme, kind), torch.empty(64, 96)
    for seed in range(3):
        grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
        layer.step(grad, 0.05, 0.01)
    layer.write_weight(out)
    assert torch.equal(layer.qtensor().dequantize(), out)


@pytest.mark.parametrize("kind", ["plain", "search"])
@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 40), Scheme(2, 32, sym=False)], ids=lambda s: s.name)
def test_steps_lower_the_error_they_are_given_the_gradient_of(scheme: Scheme, kind: str) -> None:
    layer, gram, out = tuned(scheme, kind), moment().mean, torch.empty(64, 96)

    def error() -> float:
        layer.write_weight(out)
        return float(((out - weight()) @ gram * (out - weight())).sum())

    before = error()
    best = before
    for i in range(60):
        layer.step((out - weight()) @ gram, 0.01 * (1 - i / 60), 0.002 * (1 - i / 60))
        best = min(best, error())
    assert best < 0.4 * before


def test_without_a_range_step_the_grid_stays() -> None:
    layer = tuned(Scheme(4, 32), "plain")
    before = layer.qtensor()
    layer.step(torch.randn(64, 96), 0.4, 0.0)
    after = layer.qtensor()
    assert torch.equal(before.scales, after.scales)
    assert not torch.equal(before.codes, after.codes)


def test_better_starts_have_lower_output_error() -> None:
    gram, errors = moment(), []
    for kind in ("plain", "search", "compensated"):
        difference = quantise_alone(weight(), Scheme(3, 32), kind, inputs_from(gram, kind), CPU).dequantize() - weight()
        errors.append(float((difference @ gram.mean * difference).sum()))
    assert errors[0] > 1.05 * errors[1]
    assert errors[1] > 1.3 * errors[2]


def test_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise_alone(weight(), Scheme(4, 32, sym=False), "search", inputs_from(moment(), "search"), CPU)
    monkeypatch.setattr("auto_round.tune.alone.COMPENSATED_ROWS", 10)
    monkeypatch.setattr("auto_round.tune.passes.ROW_CHUNK", 500)
    assert quantise_alone(weight(), Scheme(4, 32, sym=False), "search", inputs_from(moment(), "search"), CPU).same(
        whole
    )


def test_zero_weights_stay_zero() -> None:
    for sym in (True, False):
        tensor = quantise_alone(torch.zeros(32, 64), Scheme(4, 32, sym=sym), "plain", None, CPU)
        assert (tensor.dequantize() == 0).all()


def test_nan_is_refused() -> None:
    bad = weight()
    bad[3, 5] = float("nan")
    with pytest.raises(AutoRoundError, match="NaN"):
        quantise_alone(bad, Scheme(), "plain", None, CPU)
