"""Second moments: shared by what reads the same tensor, largest first, gone when they are taken."""

from __future__ import annotations

import torch
from torch import nn

from auto_round.tune.moments import SPAN, Moments


def mean_of(moments: Moments, name: str) -> torch.Tensor:
    moment = moments.take(name)
    assert moment is not None
    return moment.mean


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
    assert found.tokens == 8
    torch.testing.assert_close(found.mean, tokens[mask].t() @ tokens[mask] / 8)
    assert moments.take("q") is None
    assert moments.reached("q")
    assert moments.take("unreached") is None
    assert not moments.reached("unreached")


def test_padding_counts_nothing_where_a_model_takes_tokens_in_one_row() -> None:
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    moments = Moments({"fc": nn.Linear(8, 4)})
    moments.next_batch(mask)
    moments.observe("fc", inputs.flatten(0, 1))
    real = inputs[mask]
    torch.testing.assert_close(mean_of(moments, "fc"), real.t() @ real / 8)


def test_moments_without_room_are_left_for_another_round() -> None:
    linears = {name: nn.Linear(8, 4) for name in ("q", "k", "o", "p")}
    first, second = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def gathered(names: list[str], room: int | None) -> Moments:
        with Moments({name: linears[name] for name in names}, room) as moments:
            for tokens in (first, second):
                moments.next_batch(None)
                shared, other, last = tokens.clone(), tokens + 1, tokens + 2
                for name, inputs in (("q", shared), ("k", shared), ("o", other), ("p", last)):
                    linears[name](inputs)
        return moments

    whole = gathered(list(linears), None)
    assert whole.left() == []
    expected = {name: mean_of(whole, name) for name in ("q", "o", "p")}
    for room, rounds in ((1, [["q", "k"], ["o"], ["p"]]), (2 * 4 * 64, [["q", "k", "o"], ["p"]])):
        pending = list(linears)
        for names in rounds:
            moments = gathered(pending, room)
            pending = moments.left()
            assert [name for shared in moments.shared() for name in shared] == names
            for owner in {moments.owner(name) for name in names}:
                torch.testing.assert_close(mean_of(moments, owner), expected[owner], rtol=0, atol=0)
        assert pending == []


def test_both_triangles_are_there_also_where_inputs_go_in_spans() -> None:
    width = 2 * SPAN + 5
    moments, inputs = Moments({"a": nn.Linear(width, 1, device="meta")}), torch.randn(2, 3, width)
    moments.next_batch(None)
    moments.observe("a", inputs)
    found = moments.take("a")
    assert found is not None
    torch.testing.assert_close(found.mean, found.mean.t())
    torch.testing.assert_close(found.mean, (inputs.flatten(0, 1).t() @ inputs.flatten(0, 1)) / 6)


def test_a_moment_is_known_by_ten_tokens_for_each_input_of_every_layer() -> None:
    linears = {"q": nn.Linear(8, 4), "k": nn.Linear(8, 4), "expert": nn.Linear(4, 4), "left": nn.Linear(8, 4)}
    tokens = torch.randn(2, 40, 8)
    with Moments(linears, room=4 * (8**2 + 4**2)) as moments:
        for count, known in ((19, False), (21, True)):
            moments.next_batch(None)
            linears["q"](tokens)
            linears["k"](tokens)
            linears["expert"](tokens[0, :count, :4])
            linears["left"](tokens + 1)
            assert moments.known() == known
    assert moments.left() == ["left"]
