from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import FormatError
from auto_round.formats.shards import copied, encoded, parse_size, write_shards
from auto_round.source.checkpoint import Checkpoint

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5).half(),
    "wide": torch.arange(6, dtype=torch.int64),
}


def test_shards_are_read_by_the_reference_and_hold_the_same_bytes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source, out = Checkpoint(tmp_path), tmp_path / "out"
    out.mkdir()
    made = {"words": torch.tensor([[1, -1]], dtype=torch.int32), "scales": torch.ones(1, 3).half()}
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in made.items()}
    pieces = [copied(source, name) for name in source] + [encoded("layer", specs, lambda: made)]
    (file,) = write_shards(out, pieces, 10**6)
    read = load_file(file)
    for name, tensor in {**TENSORS, **{f"layer.{k}": t for k, t in made.items()}}.items():
        assert torch.equal(read[name], tensor)


def test_small_shards_get_an_index_that_names_every_tensor_once(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source, out = Checkpoint(tmp_path), tmp_path / "out"
    out.mkdir()
    files = write_shards(out, [copied(source, name) for name in source], 36)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert [f.name for f in files] == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert all(torch.equal(Checkpoint(out).tensor(name), tensor) for name, tensor in TENSORS.items())


def test_bytes_that_do_not_fit_their_header_are_refused(tmp_path: Path) -> None:
    piece = encoded("layer", {"scales": (torch.float16, (2,))}, lambda: {"scales": torch.ones(3).half()})
    with pytest.raises(FormatError, match=r"layer\.scales"):
        write_shards(tmp_path, [piece], 100)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 * 10**9), (123, 123)])
def test_sizes_are_parsed(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="max_shard_size"):
        parse_size(text)
