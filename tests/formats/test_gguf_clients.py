"""llama.cpp opens what we write: its tokens, logits and text are those of our own dequantised model.

Two things are compared. First what llama.cpp reads: it makes a file of floats of ours itself, and computes with that.
Then what its kernels compute from the blocks: they round activations to 8 bits first, so that logits differ by about as
much as those of our model do once the same rounding is put into it (see `llama_rounding`), and not by more. The two do
not come nearer to each other than that: a last bit that differs turns roundings over, in a few layers all alike. The
figures are printed (pytest -rP).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.clients import llama_cpp, run
from tests.formats.gguf_models import CONFIGS, character_tokenizer, quantised, tiny_model
from tests.formats.llama_rounding import dequantised
from tests.llama_client import LOGITS, QUANTISE
from tests.models import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound
from auto_round.evaluate.metrics import held_out_text
from auto_round.formats import GGUF_FILE_TYPES
from auto_round.formats.base import Export
from auto_round.formats.gguf.writer import GgufFormat
from auto_round.source.opening import open_source
from auto_round.spec.plan import Plan
from auto_round.spec.scheme import Scheme

pytestmark = pytest.mark.slow
AS_READ = 1e-6  # nats a token: between llama.cpp on floats that it read from our blocks, and our own
AS_COMPUTED = 1.25  # times the divergence that rounding activations to 8 bits makes in our own model
LARGEST_GAP = 0.01  # of logits, between our likeliest token and the one that llama.cpp chose
TOKENS = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(2))
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
    GgufFormat("bf16").write(export, folder, None)
    return next(folder.glob("*.gguf"))


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) over positions; logits (n, vocabulary). In float64: the least of interest is 1e-7."""
    total = 0.0
    for one, two in zip(reference.split(64), other.split(64), strict=True):
        p, q = torch.log_softmax(one.double(), -1), torch.log_softmax(two.double(), -1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(reference)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_computes_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """Random weights whose logits depend strongly on every part; longer than the sliding windows."""
    source = tiny_model(name, tmp_path / "in")
    file = float_file(source, tmp_path / "out")
    check_tiny(source, file, file, tmp_path)


@pytest.mark.parametrize("given", [{}, {"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
def test_a_yarn_rotation_is_the_same_in_llama_cpp(given: dict[str, float], tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    source = tiny_model("qwen2", tmp_path / "in", rope_parameters={**yarn, **given})
    file = float_file(source, tmp_path / "out")
    check_tiny(source, file, file, tmp_path)


def test_added_runs_of_spaces_are_found_in_text(tmp_path: Path) -> None:
    source, tokenizer = tiny_model("llama", tmp_path / "in"), character_tokenizer()
    tokenizer.save_pretrained(source)
    texts = ["ab  ab   x", "a b  a x", "   ab  "]
    _, answer = ask(float_file(source, tmp_path / "out"), tmp_path, [1], texts=texts)
    assert answer["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def read_by_llama_cpp(file: Path, folder: Path) -> Path:
    """The same model with all its tensors in float32, dequantised by llama.cpp."""
    floats = folder / "floats.gguf"
    job = {"source": str(file), "target": str(floats), "file_type": 0, "from_blocks": True}
    assert run(llama_cpp(), QUANTISE, json.dumps(job)).split()[-1] == "0"
    return floats


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_quantised_experts_are_what_llama_cpp_computes(name: str, kind: str, tmp_path: Path) -> None:
    """Rows of 256, so that K types are used; each expert's rows are its own."""
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}
    wide |= {"shared_expert_intermediate_size": 256} if name == "qwen2_moe" else {}
    source = tiny_model(name, tmp_path / "in", **wide)
    file = quantised(source, tmp_path / "out", kind)
    check_tiny(source, file, read_by_llama_cpp(file, tmp_path), tmp_path)
    with torch.no_grad():
        exact, rounded = (dequantised(source, file, rounding=rounding)(TOKENS).logits[0] for rounding in (False, True))
    computed, _ = ask(file, tmp_path, TOKENS[0].tolist())
    as_computed, by_rounding = divergence(exact, computed), divergence(exact, rounded)
    print(f"{name} {kind}: KL divergence {as_computed:.6f} as computed, {by_rounding:.6f} by rounding activations")
    assert as_computed < AS_COMPUTED * by_rounding


@torch.no_grad()
def check_tiny(source: Path, file: Path, asked: Path, folder: Path) -> None:
    """Compare our reading of `file` with what llama.cpp computes from `asked`, which holds the same in floats."""
    expected = dequantised(source, file, rounding=False)(TOKENS).logits[0]
    found, _ = ask(asked, folder, TOKENS[0].tolist())
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
    """Quantise, and compare what llama.cpp makes of the file with our dequantised model."""
    tuner = AutoRound(source, device="cpu", **settings)
    tuner.quantize_and_save(folder / "out", format=f"gguf:{kind}", enable_check=False)
    compare_file(source, next((folder / "out").glob("*.gguf")), folder, held_out_text())


@torch.no_grad()
def compare_file(source: Path, file: Path, folder: Path, text: str) -> None:
    """Compare on the first 512 tokens of a text, and on 20 greedy ones after the first 60."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(text)["input_ids"][:512]
    ids, prompt = torch.tensor([tokens]), tokens[:60]
    read, answer = ask(read_by_llama_cpp(file, folder), folder, tokens, prompt=prompt, texts=HARD_TEXTS)
    computed, theirs = ask(file, folder, tokens, prompt=prompt)
    rounded = dequantised(source, file, rounding=True)(ids).logits[0]
    model = dequantised(source, file, rounding=False)
    exact = model(ids).logits[0]
    states = model(torch.tensor([prompt + answer["greedy"]])).logits[0, 59:-1]
    chosen = states.gather(1, torch.tensor(answer["greedy"])[:, None])[:, 0]
    as_read, as_computed, by_rounding = (divergence(exact, other) for other in (read, computed, rounded))
    print(
        f"{file.name}: KL divergence {as_read:.1e} (largest logit gap {(read - exact).abs().max():.1e}) as "
        f"llama.cpp reads it, {as_computed:.5f} as its kernels compute it, {by_rounding:.5f} by rounding activations "
        f"alone, {divergence(rounded, computed):.5f} between the two; greedy tokens as ours: "
        f"{int((states.argmax(-1) == torch.tensor(answer['greedy'])).sum())} of 20 read, "
        f"{sum(a == b for a, b in zip(theirs['greedy'], answer['greedy'], strict=True))} of 20 computed"
    )
    assert answer["tokens"] == [tokenizer(text)["input_ids"] for text in HARD_TEXTS]
    assert as_read < AS_READ
    assert (states.amax(-1) - chosen).max() < LARGEST_GAP
    assert as_computed < AS_COMPUTED * by_rounding


@pytest.mark.parametrize("kind", GGUF_FILE_TYPES)
def test_every_type_of_a_real_model_is_what_llama_cpp_computes(kind: str, first_layers: Path, tmp_path: Path) -> None:
    check_file(first_layers, tmp_path, kind, recipe="rtn", iters=0)


@torch.no_grad()
def test_a_scale_one_percent_off_would_show(first_layers: Path, tmp_path: Path) -> None:
    """The bound above is one that a wrong layer breaks."""
    model = dequantised(first_layers, quantised(first_layers, tmp_path / "out", "q4_k_m"), rounding=False)
    ids = AutoTokenizer.from_pretrained(first_layers)(held_out_text(), return_tensors="pt")["input_ids"][:, :512]
    exact = model(ids).logits[0]
    model.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    assert divergence(exact, model(ids).logits[0]) > 3 * AS_READ


def test_a_tuned_real_model_is_what_llama_cpp_computes(smollm2: Path, tmp_path: Path) -> None:
    check_file(smollm2, tmp_path, "q4_k_m", iters=2, nsamples=4, seqlen=128, batch_size=4, dataset="builtin")


@pytest.mark.parametrize("model", list(MODELS))
def test_other_real_models_are_what_llama_cpp_computes(
    model: str, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    check_file(real_model(model), tmp_path, "q4_k_m", recipe="rtn", iters=0)
