"""Ranking, spellings and reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from auto_round.errors import BackendError
from auto_round.inference import select
from auto_round.inference.backends.torch_reference import BACKEND, TorchReference
from auto_round.inference.base import Reason
from auto_round.inference.convert_model import infer_target_device
from auto_round.spec.scheme import Scheme

CPU = torch.device("cpu")
SHAPE = (64, 96)


class Picky(TorchReference):
    """Better than the reference where it can run at all."""

    name = "picky"
    rank = 9
    spellings: tuple[str, ...] = ("ark",)

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        return None if scheme.bits == 4 else Reason(f"{scheme.bits} bits are not supported", "use 4 bits")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Picky:
    picky = Picky()
    monkeypatch.setattr(select, "ranked", lambda: (picky, BACKEND))
    return picky


def test_files_in_the_backends_folder_are_found() -> None:
    assert "torch_reference" in list(select.BACKENDS)
    assert BACKEND in select.ranked()
    ranks = [b.rank for b in select.ranked()]
    assert ranks == sorted(ranks, reverse=True)
    assert all(b.name in select.BACKENDS for b in select.ranked())


def test_the_best_that_can_run_a_layer_is_chosen(two: Picky) -> None:
    assert select.choose("auto", "a", Scheme(4, 32), SHAPE, torch.float32, CPU) is two
    assert select.choose("ipex", "a", Scheme(2, 32), SHAPE, torch.float32, CPU) is BACKEND
    assert select.choose("torch", "a", Scheme(4, 32), SHAPE, torch.float32, CPU) is BACKEND


def test_a_backend_asked_for_is_never_replaced(two: Picky) -> None:
    message = r"'mlp\.down' \(W2A16G32, 64 x 96, .*picky: 2 bits are not supported; use 4 bits.*auto"
    with pytest.raises(BackendError, match=message):
        select.choose("ark", "mlp.down", Scheme(2, 32), SHAPE, torch.float32, CPU)


def test_explain_lists_every_backend_with_its_reason(two: Picky) -> None:
    reasons = select.explain(Scheme(2, 32), SHAPE, torch.float32, CPU)
    assert list(reasons) == ["picky", "torch_reference"]
    assert str(reasons["picky"]) == "2 bits are not supported; use 4 bits"
    assert reasons["torch_reference"] is None


@pytest.mark.parametrize("spelling", ["ark", "auto_round:mlx", "hpu", "auto_gptq:cuda"])
def test_families_of_other_readers_say_why_they_are_not_here(spelling: str) -> None:
    with pytest.raises(BackendError, match=rf"'{spelling}' is not available: it needs .*torch_reference"):
        select.requested(spelling)


def test_unknown_spellings_get_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"unknown backend 'marlim'\. Did you mean marlin"):
        select.requested("marlim")


@pytest.mark.parametrize(
    ("spelling", "names"),
    [
        ("gptqmodel", ["marlin", "exllamav2"]),
        ("gptqmodel:exllamav2", ["exllamav2"]),
        ("auto_round:marlin", ["marlin"]),
        ("tinygemm", ["int4pack"]),
        ("cuda", ["marlin", "exllamav2", "triton", "int4pack"]),
        ("xpu", ["triton"]),
        ("cpu", ["native"]),
    ],
)
def test_families_are_ranked(spelling: str, names: list[str]) -> None:
    assert [b.name for b in select.requested(spelling)] == names


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ({"": "cpu"}, "cpu"),
        ({"": torch.device("cpu")}, "cpu"),
        ({"a": "cpu", "b": "disk"}, "cpu"),
        (None, "cpu"),
        ("auto", "cuda"),
        ("balanced", "cuda"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        ({"a": "cpu", "b": 1, "c": 0}, "cuda:1"),
        ({"a": "disk", "b": torch.device("cuda:0")}, "cuda:0"),
    ],
)
def test_the_device_of_a_device_map(monkeypatch: pytest.MonkeyPatch, device_map: Any, expected: str) -> None:
    """On a machine with two CUDA devices."""
    monkeypatch.setattr("auto_round.runtime.device._count", lambda kind: 2 if kind == "cuda" else 0)
    assert infer_target_device(device_map) == expected
