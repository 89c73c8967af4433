"""Compiled decoding writes what eager decoding writes, in one graph that holds the kernel's operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_llama
from tests.inference.test_load import IDS, opened, write_folder

from auto_round.inference.base import Reason
from auto_round.inference.compiled import compile_decoding
from auto_round.inference.kernels import native

built = pytest.mark.skipif(isinstance(native.library(), Reason), reason="no C compiler when the package was installed")

SETTINGS = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@built
def test_all_steps_of_one_token_share_a_graph_of_operators(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama())
    model = opened(tmp_path)
    expected = model.generate(IDS, **SETTINGS)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_decoding(model, backend=keep)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **SETTINGS), expected)
    operator = torch.ops.auto_round.tiles_linear
    assert [sum(node.target is operator for node in graph.graph.nodes) for graph in graphs] == [14]
    for length in (11, 13, 16):  # a cache of another length compiles once more at most, for all lengths
        settings = {**SETTINGS, "min_new_tokens": length, "max_new_tokens": length}
        expected = model.generate(IDS, **settings)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), expected)
    assert len(graphs) <= 2  # 1 where this process has seen lengths change before


@built
def test_prompts_and_growing_caches_are_not_compiled(tmp_path: Path) -> None:
    write_folder(tmp_path, tiny_llama())
    model = opened(tmp_path)
    expected = model.generate(IDS, **SETTINGS)

    def refuse(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise AssertionError("compiled")

    compile_decoding(model, backend=refuse)
    assert torch.equal(model.generate(IDS, **SETTINGS), expected)
    model(IDS)
