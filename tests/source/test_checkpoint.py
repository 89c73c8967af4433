"""Safetensors headers, good and bad, against the reference implementation of the format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from auto_round.errors import SourceError
from auto_round.source.checkpoint import Checkpoint

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b.weight": torch.randn(4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write(folder: Path, header: dict[str, object], data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_those_the_reference_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "x-1.safetensors")
    save_file({"b": TENSORS["b.weight"]}, tmp_path / "x-2.safetensors")
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(Checkpoint(tmp_path).tensor("b"), TENSORS["b.weight"])
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"x-2\.safetensors.*not in the folder"):
        Checkpoint(tmp_path)


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert list(Checkpoint(tmp_path)) == ["a"]


def test_an_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="outside the folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"model\.safetensors.*(truncated|not a safetensors)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        ({"a": entry(0, 8, [8]), "b": entry(4, 12, [8])}, 12, "overlaps"),
        ({"a": entry(0, 4, [4]), "b": entry(8, 12, [4])}, 12, "hole"),
        ({"a": entry(0, 4, [8])}, 4, "claims 4 bytes"),
        ({"a": {"dtype": "U8"}}, 0, "damaged"),
        ({"a": entry(0, 4, [4])}, 9, "longer"),
    ],
)
def test_damaged_headers_name_the_tensor(tmp_path: Path, header: dict[str, object], size: int, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        Checkpoint(write(tmp_path, header, bytes(size)))


def test_pickles_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="save_pretrained"):
        Checkpoint(tmp_path)


def test_a_missing_tensor_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"'c\.weight'"):
        Checkpoint(tmp_path).tensor("c.weight")
