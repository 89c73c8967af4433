"""The start knows how much text its moments are of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.numerics.compensate import compensation
from auto_round.spec.scheme import Scheme
from auto_round.tune.alone import quantise_alone
from auto_round.tune.moments import Moment
from auto_round.tune.start import Inputs, importance_of, inputs_from, shrinkage_of

WIDTH = 128


def tokens(count: int, seed: int) -> Tensor:
    """(count, WIDTH) whose second moment has eigenvalues that fall as 1 / k, as those of language models do."""
    directions, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    sizes = torch.arange(1, WIDTH + 1).float() ** -0.5
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * sizes @ directions.t()


def test_shrinkage_is_two_inputs_per_token_and_at_most_one() -> None:
    mean = torch.eye(64)
    assert [shrinkage_of(Moment(mean, count)) for count in (1, 640, 12_800)] == [1.0, 0.2, 0.01]


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(4, 32, sym=False)], ids=str)
def test_a_layer_whose_inputs_are_all_zero_is_rounded_as_if_they_were_not_known(scheme: Scheme) -> None:
    weight = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5))
    weight[0] = 0  # the smallest scale there is
    silent = inputs_from(Moment(torch.zeros(WIDTH, WIDTH), 100), "compensated")
    assert silent is not None
    assert silent.compensation is not None
    assert silent.compensation.factor.isfinite().all()
    found, unknown = (
        quantise_alone(weight, scheme, "compensated", known, torch.device("cpu")) for known in (silent, None)
    )
    error, usual = ((tensor.dequantize() - weight).square().sum() for tensor in (found, unknown))
    assert error < 1.05 * usual


def test_a_moment_of_few_tokens_is_not_trusted_more_than_it_knows() -> None:
    weight = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(2))
    few = tokens(160, 3)
    moment, other = Moment(few.t() @ few / len(few), len(few)), tokens(4000, 4)

    def error_on_other_tokens(inputs: Inputs | None) -> float:
        found = quantise_alone(weight, Scheme(2, 32), "compensated", inputs, torch.device("cpu")).dequantize()
        return float((other @ (found - weight).t()).square().mean())

    trusting = Inputs(importance_of(moment.mean), compensation(moment.mean, 0.0))
    assert error_on_other_tokens(inputs_from(moment, "compensated")) < 0.75 * error_on_other_tokens(trusting)
