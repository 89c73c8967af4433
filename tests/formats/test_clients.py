"""Other software opens what we write and computes what our dequantised weights give, and we open what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients import client, run
from tests.formats.coded import quantised
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.load import dequantized_state_dict

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

# Where a client rounds scale * (code - zero point) to float16, as all do with zero points, and Intel's on any CPU,
# logits of up to 30 move by up to 0.07; bfloat16 would move them by 0.12.
HALVES = 0.1

CLIENTS = {"compressed-tensors": COMPRESSED, "gptqmodel": GPTQMODEL, "auto-round": INTEL}

OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, facts, answer, dequantise = sys.argv[1:]
ids = torch.load(facts)
options = {}
if dequantise == "True":
    from transformers import CompressedTensorsConfig
    options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
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


@pytest.fixture(scope="module")
def coded(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The model rounded to four bits in groups of 64, in every format, and what its weights answer; by symmetry."""
    found = {}
    for symmetry in ("sym", "asym"):
        folder = tmp_path_factory.mktemp(symmetry) / "all"
        quantised(smollm2, folder, "auto_round,auto_gptq,auto_awq,llm_compressor", group_size=64, sym=symmetry == "sym")
        found[symmetry] = folder, expected(smollm2, folder / "auto_round")
    return found


# compressed-tensors 0.20 gives a model on the meta device zero points that are not packed, so that transformers finds
# those of no asymmetric file to fit, its own neither; with dequantize=True it reads them as it wrote them.
@pytest.mark.parametrize(
    ("symmetry", "name", "format", "tolerance"),
    [
        ("sym", "compressed-tensors", "llm_compressor", 1e-3),
        ("asym", "compressed-tensors", "llm_compressor", HALVES),
        ("sym", "gptqmodel", "auto_gptq", 1e-2),
        ("asym", "gptqmodel", "auto_gptq", HALVES),
        ("asym", "gptqmodel", "auto_awq", HALVES),
        ("sym", "auto-round", "auto_round", HALVES),
    ],
)
def test_a_client_computes_what_our_dequantised_weights_give(
    coded: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    symmetry: str,
    name: str,
    format: str,
    tolerance: float,
) -> None:
    folder, ours = coded[symmetry]
    torch.save(ours["ids"], tmp_path / "ids.pt")
    python = client(name, CLIENTS[name], dependencies=name == "auto-round")
    dequantise = (symmetry, name) == ("asym", "compressed-tensors")
    run(python, OPEN, folder / format, tmp_path / "ids.pt", tmp_path / "answer.pt", dequantise)
    theirs = torch.load(tmp_path / "answer.pt")
    torch.testing.assert_close(theirs["logits"], ours["logits"], atol=tolerance, rtol=0)
    assert torch.equal(theirs["text"], ours["text"])


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_we_open_what_intel_s_auto_round_writes(smollm2: Path, tmp_path: Path, symmetry: str) -> None:
    python = client("auto-round", INTEL, dependencies=True)
    run(python, WRITE, smollm2, tmp_path / "theirs", symmetry)
    (folder,) = {file.parent for file in (tmp_path / "theirs").rglob("config.json")}
    ours = expected(smollm2, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ours["ids"]).logits, ours["logits"], atol=1e-3, rtol=0)
