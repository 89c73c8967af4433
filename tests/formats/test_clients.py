"""Other software opens what we write and computes what our dequantised weights give, and we open what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients import client, run
from tests.formats.coded import quantised
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.cli.demo import demo_model
from auto_round.load import dequantized_state_dict
from auto_round.source.opening import open_source

pytestmark = pytest.mark.slow

PROMPT = "The history of the lighthouse begins with a fire on a hill. Sailors"
COMPRESSED = ("compressed-tensors==0.20.0", "loguru")
INTEL = ("auto-round==0.16.1",)
# gptqmodel 7.7 declares torch >= 2.14.1 and works with 2.13: installed without dependencies, plus those it imports.
GPTQMODEL = (
    "gptqmodel==7.7.0",
    "optimum==2.3.0",
    *("datasets", "defuser", "device-smi", "dill", "logbar", "multiprocess", "pandas", "pillow", "protobuf"),
    *("pyarrow", "pypcre", "python-dateutil", "threadpoolctl", "tokenicer", "torchao", "tzdata", "xxhash"),
)

OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, facts, answer = sys.argv[1:]
ids = torch.load(facts)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
with torch.no_grad():
    logits = model(ids).logits.float()
    text = model.generate(ids, max_new_tokens=20, do_sample=False)
torch.save({"logits": logits, "text": text}, answer)
"""

WRITE = """
import sys
from auto_round import AutoRound
if __name__ == "__main__":
    source, folder, sym = sys.argv[1:]
    tuner = AutoRound(source, scheme="W4A16", group_size=64, sym=sym == "sym", iters=0, nsamples=1, seqlen=32,
                      disable_opt_rtn=True)
    tuner.quantize_and_save(folder, format="auto_round")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, whose 576 inputs are no multiple of 128."""
    return open_source(demo_model(), None, tmp_path_factory.mktemp("smollm2")).folder


# compressed-tensors 0.20 wants unpacked zero points here and gptqmodel rounds more in float16: see docs/formats.md;
# shown as expected failures until each has its own way of opening and tolerance.
ASYMMETRIC = pytest.param(
    "asym", marks=pytest.mark.xfail(reason="clients disagree on zero points, see docs/formats.md")
)


@pytest.fixture(scope="module", params=["sym", ASYMMETRIC])
def folders(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model rounded to four bits in groups of 64, in every format."""
    formats = "auto_round,auto_gptq,auto_awq,llm_compressor"
    folder = tmp_path_factory.mktemp("coded") / "all"
    return quantised(source, folder, formats, group_size=64, sym=request.param == "sym")


def expected(source: Path, folder: Path) -> dict[str, Any]:
    """Token ids of the prompt, and what our float32 dequantisation answers."""
    ids = AutoTokenizer.from_pretrained(source)(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in dequantized_state_dict(folder).items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        return {
            "ids": ids,
            "logits": model(ids).logits,
            "text": model.generate(ids, max_new_tokens=20, do_sample=False),
        }


@pytest.mark.parametrize(
    ("name", "packages", "format", "tolerance"),
    [
        ("compressed-tensors", COMPRESSED, "llm_compressor", 1e-3),
        ("gptqmodel", GPTQMODEL, "auto_gptq", 1e-2),
        ("gptqmodel", GPTQMODEL, "auto_awq", 1e-2),
        ("auto-round", INTEL, "auto_round", 0.25),  # it forces float16 on the CPU; logits reach 30
    ],
)
def test_a_client_computes_what_our_dequantised_weights_give(
    source: Path, folders: Path, tmp_path: Path, name: str, packages: tuple[str, ...], format: str, tolerance: float
) -> None:
    ours = expected(source, folders / format)
    torch.save(ours["ids"], tmp_path / "ids.pt")
    python = client(name, packages, dependencies=name == "auto-round")
    run(python, OPEN, folders / format, tmp_path / "ids.pt", tmp_path / "answer.pt")
    theirs = torch.load(tmp_path / "answer.pt")
    torch.testing.assert_close(theirs["logits"], ours["logits"], atol=tolerance, rtol=0)
    assert torch.equal(theirs["text"], ours["text"])


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_we_open_what_intel_s_auto_round_writes(source: Path, tmp_path: Path, symmetry: str) -> None:
    python = client("auto-round", INTEL, dependencies=True)
    run(python, WRITE, source, tmp_path / "theirs", symmetry)
    (folder,) = {file.parent for file in (tmp_path / "theirs").rglob("config.json")}
    ours = expected(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ours["ids"]).logits, ours["logits"], atol=1e-3, rtol=0)
