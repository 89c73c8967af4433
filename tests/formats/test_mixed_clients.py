"""Folders of several bit widths and with a quantised head open through us and in Intel's auto-round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients import client, run
from tests.formats.coded import codes, quantised
from tests.formats.test_clients import HALVES, INTEL, prompt
from transformers import AutoModelForCausalLM

from auto_round.load import dequantized_state_dict

pytestmark = pytest.mark.slow

# Where logits are float32 on both sides, they differ by the order of sums alone.
EXACT = 1e-5
MIXED: dict[str, Any] = {
    "*.mlp.down_proj": {"bits": 8},
    r"layers\.(1?[02468]|2[0-9])\.self_attn\.[qkv]_proj": {"bits": 2, "group_size": 32},
    "model.layers.5.self_attn.o_proj": "keep",
}

# Intel's auto-round loads in float16 on a CPU, in which Gemma overflows: the rest is brought back to float32.
OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, facts, answer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
torch.nn.Module.float(model)  # transformers forbids the method of quantised models
with torch.no_grad():
    logits = model(torch.load(facts)).logits
kinds = {name: type(module).__module__ for name, module in model.named_modules() if hasattr(module, "qweight")}
torch.save({"logits": logits, "kinds": kinds}, answer)
"""


def dense(source: Path, folder: Path) -> Any:
    """The model with the weights that a folder stands for, in float32; a head that it holds is the model's own."""
    weights = {name: tensor.float() for name, tensor in dequantized_state_dict(folder).items()}
    untied = {"tie_word_embeddings": False} if "lm_head.weight" in weights else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **untied)
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert "lm_head.weight" not in found.missing_keys or not untied
    return model


@torch.no_grad()
def check(source: Path, folder: Path, scratch: Path, tolerance: float) -> None:
    """Logits of a folder through us and through Intel's auto-round against its dequantised weights in float32."""
    ids = prompt(source)
    expected = dense(source, folder)(ids).logits
    largest = float(expected.abs().max())
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")(ids).logits
    torch.save(ids, scratch / "ids.pt")
    python = client("auto-round", INTEL, dependencies=True)
    run(python, OPEN, folder, scratch / "ids.pt", scratch / "answer.pt")
    answer = torch.load(scratch / "answer.pt")
    gap, their_gap = (float((logits - expected).abs().max()) for logits in (ours, answer["logits"]))
    print(f"logits to {largest:.1f}: ours {gap:.2g} apart, Intel's {their_gap:.2g}")
    assert answer["kinds"].keys() == codes(folder).keys()
    assert gap <= EXACT * largest
    assert their_gap <= tolerance * largest


def test_mixed_bits(smollm2: Path, tmp_path: Path) -> None:
    folder = quantised(smollm2, tmp_path / "out", "auto_round", group_size=64, layer_config=MIXED)
    schemes = [(tensor.scheme.bits, tensor.scheme.group_size) for tensor in codes(folder).values()]
    assert {scheme: schemes.count(scheme) for scheme in set(schemes)} == {(8, 64): 30, (2, 32): 60, (4, 64): 119}
    check(smollm2, folder, tmp_path, HALVES)


def test_a_quantised_untied_head(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = real_model("gemma3-270m")
    rules = {"lm_head": {"bits": 8}}
    folder = quantised(source, tmp_path / "out", "auto_round", group_size=64, quant_lm_head=True, layer_config=rules)
    assert codes(folder)["lm_head"].scheme.bits == 8
    check(source, folder, tmp_path, HALVES)
