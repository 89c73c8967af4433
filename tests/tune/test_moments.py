"""Second moments: shared by what reads the same tensor, largest first, gone when they are taken."""

from __future__ import annotations

import torch
from torch import nn

from auto_round.tune.moments import Moments


def test_moments_are_shared_and_forgotten_when_taken() -> None:
    wide, linears = torch.randn(2, 5, 12), {name: nn.Linear(8, 4) for name in ("q", "k", "o")}
    linears["down"], tokens = nn.Linear(12, 4), torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    with Moments({**linears, "unreached": nn.Linear(16, 4)}) as moments:
        moments.next_batch(mask)
        for name in ("q", "k"):
            linears[name](tokens)
        linears["o"](tokens.clone())
        linears["down"](wide)
    assert moments.shared() == [["unreached"], ["down"], ["q", "k"], ["o"]]
    found = moments.take("k")
    assert found is not None
    torch.testing.assert_close(found, tokens[mask].t() @ tokens[mask] / 8)
    assert moments.take("q") is None
    assert moments.reached("q")
    assert moments.take("unreached") is None
    assert not moments.reached("unreached")
