"""llama.cpp opens what we write: its tokens, logits and text are those of our own dequantised model.

It rounds activations to 8 bits before it multiplies them with quantised weights, so logits differ by that much; files
of floats show that nothing else does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.clients import llama_cpp, run
from tests.formats.gguf_models import CONFIGS, tiny_model
from tests.llama_client import LOGITS
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound
from auto_round.evaluate.metrics import held_out_text
from auto_round.formats import GGUF_FILE_TYPES
from auto_round.formats.base import Export
from auto_round.formats.gguf.reader import read_floats
from auto_round.formats.gguf.writer import GgufFormat
from auto_round.source.opening import open_source
from auto_round.spec.plan import Plan
from auto_round.spec.scheme import Scheme

pytestmark = pytest.mark.slow
LARGEST_DIVERGENCE = 0.005  # nats a token
LARGEST_GAP = 0.3  # of logits
HARD_TEXTS = [
    "Hello world, it's 2024!  Numbers 1234567 and\n\n\tcode: if(x==1){return 'ä';}",
    "日本語のテキスト と  emoji 😀🚀 ñandú",
    " leading space, can't WON'T  we'll   x\n\n\n y\r\nz",
]


def ask(file: Path, folder: Path, tokens: list[int], **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits (tokens, vocabulary) of llama.cpp, and what else it was asked."""
    logits = folder / "logits.npy"
    answer = run(llama_cpp(), LOGITS, json.dumps({"file": str(file), "tokens": tokens, "logits": str(logits), **more}))
    return torch.from_numpy(np.load(logits)), json.loads(answer)


def float_file(source: Path, folder: Path) -> Path:
    opened = open_source(source, None, folder / "scratch")
    folder.mkdir(parents=True, exist_ok=True)
    export = Export(
        checkpoint=opened.checkpoint,
        config=opened.raw_config,
        plan=Plan(Scheme(), (), ()),
        stored_names={},
        replaced={},
        tensor=lambda name: pytest.fail(name),
        weight=lambda name: pytest.fail(name),
        extra=(),
        provenance={},
        tokenizer=opened.tokenizer,
    )
    GgufFormat("bf16").write(export, folder, 1 << 40)
    return next(folder.glob("*.gguf"))


@torch.no_grad()
def dequantised(source: Path, file: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict({name: value.float() for name, value in read_floats(file)}, strict=False)
    return model.eval()


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) over positions; logits (n, vocabulary)."""
    p, q = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_computes_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """Random weights whose logits depend strongly on every part; longer than the sliding windows."""
    source = tiny_model(name, tmp_path / "in")
    file = float_file(source, tmp_path / "out")
    tokens = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        expected = model(torch.tensor([tokens])).logits[0]
    found, _ = ask(file, tmp_path, tokens)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def first_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first four layers, embedding and head: all types of layer, in seconds."""
    folder = tmp_path_factory.mktemp("first")
    model = AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def check_file(source: Path, folder: Path, kind: str, **settings: Any) -> None:
    """Quantise, open in llama.cpp, and compare with our dequantised model on 512 tokens and 20 greedy ones."""
    AutoRound(source, device="cpu", **settings).quantize_and_save(folder / "out", format=f"gguf:{kind}")
    file = next((folder / "out").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(held_out_text())["input_ids"][:512]
    found, answer = ask(file, folder, tokens, prompt=tokens[:60], texts=HARD_TEXTS)
    model = dequantised(source, file)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
        assert divergence(expected, found) < LARGEST_DIVERGENCE
        assert answer["tokens"] == [tokenizer(text)["input_ids"] for text in HARD_TEXTS]
        states = model(torch.tensor([tokens[:60] + answer["greedy"]])).logits[0, 59:-1]
    # Every token that llama.cpp chose is our model's own choice, or as near to it as its rounding of activations.
    chosen = states.gather(1, torch.tensor(answer["greedy"])[:, None])[:, 0]
    assert (states.amax(-1) - chosen).max() < LARGEST_GAP


@pytest.mark.parametrize("kind", GGUF_FILE_TYPES)
def test_every_type_of_a_real_model_is_what_llama_cpp_computes(kind: str, first_layers: Path, tmp_path: Path) -> None:
    check_file(first_layers, tmp_path, kind, recipe="rtn", iters=0)


def test_a_tuned_real_model_is_what_llama_cpp_computes(smollm2: Path, tmp_path: Path) -> None:
    check_file(smollm2, tmp_path, "q4_k_m", iters=2, nsamples=4, seqlen=128, batch_size=4, dataset="builtin")
