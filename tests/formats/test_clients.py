"""Other software opens what we write and computes what our dequantised weights give, and we open what it writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clients import client, run
from tests.formats.coded import quantised
from tests.formats.gguf_models import tiny_model
from tests.models import MODELS
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
# logits move by up to 1/400 of the largest; bfloat16 has steps of 1/256.
HALVES = 1 / 256

FOLDERS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")
CLIENTS = {"compressed-tensors": COMPRESSED, "gptqmodel": GPTQMODEL, "auto-round": INTEL}

OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, facts, answer, way = sys.argv[1:]
ids = torch.load(facts)
options = {}
if way == "dequantised":
    from transformers import CompressedTensorsConfig
    options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
if way == "widened":
    torch.nn.Module.float(model)  # transformers forbids the method of quantised models
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


CONFLICTS = """
import sys
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import fused_unit_dynamic_conflicts
folder, *names = sys.argv[1:]
config = QuantizeConfig.from_pretrained(folder)
print([conflict.unit for conflict in fused_unit_dynamic_conflicts(names, config)])
"""


def dense(source: Path, folder: Path) -> Any:
    """The model with the weights that a folder stands for, in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in dequantized_state_dict(folder).items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


def prompt(source: Path) -> torch.Tensor:
    """Token ids (1, n)."""
    ids: torch.Tensor = AutoTokenizer.from_pretrained(source)(PROMPT, return_tensors="pt").input_ids
    return ids


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """A model rounded to four bits in groups of 64, in every format, made when it is first asked for."""

    @cache
    def made(source: Path, symmetry: str) -> Path:
        folder = tmp_path_factory.mktemp(symmetry) / "all"
        return quantised(source, folder, ",".join(FOLDERS), group_size=64, sym=symmetry == "sym")

    return made


@torch.no_grad()
def check_client(source: Path, folder: Path, scratch: Path, case: tuple[str, str, str, float]) -> None:
    """Compare a client's logits with ours, and its greedy text; case: one of CASES."""
    symmetry, client_name, _, tolerance = case
    ids = prompt(source)
    torch.save(ids, scratch / "ids.pt")
    python = client(client_name, CLIENTS[client_name], dependencies=client_name == "auto-round")
    run(
        python,
        OPEN,
        folder,
        scratch / "ids.pt",
        scratch / "answer.pt",
        WAYS.get((symmetry, client_name), "as it comes"),
    )
    theirs = torch.load(scratch / "answer.pt")
    model = dense(source, folder)
    ours = model(ids).logits
    allowed = tolerance * float(ours.abs().max())
    gap = float((theirs["logits"] - ours).abs().max())
    text = model.generate(ids, max_new_tokens=20, do_sample=False)
    same = torch.equal(text, theirs["text"])
    print(f"{client_name}, {folder.name}: logits to {ours.abs().max():.1f}, {gap:.2g} apart; same 20 tokens: {same}")
    assert gap <= allowed
    # Each of the client's tokens is our own choice, or so near to it that logits within the tolerance can swap them.
    states = model(theirs["text"]).logits[0, ids.shape[1] - 1 : -1]
    chosen = states.gather(1, theirs["text"][0, ids.shape[1] :, None])[:, 0]
    assert (states.amax(-1) - chosen).max() <= 2 * allowed


# compressed-tensors 0.18 to 0.20 gives a model on the meta device zero points that are not packed, so that transformers
# finds those of no asymmetric file to fit, its own neither; with dequantize=True it reads them as it wrote them.
# Intel's auto-round loads in float16 on a CPU, in which Gemma overflows: what is not packed goes back to float32.
WAYS = {("asym", "compressed-tensors"): "dequantised", ("sym", "auto-round"): "widened"}
CASES = [
    ("sym", "compressed-tensors", "llm_compressor", 1e-4),
    ("asym", "compressed-tensors", "llm_compressor", HALVES),
    ("sym", "gptqmodel", "auto_gptq", 1e-3),
    ("asym", "gptqmodel", "auto_gptq", HALVES),
    ("sym", "gptqmodel", "auto_awq", 1e-3),
    ("asym", "gptqmodel", "auto_awq", HALVES),
    ("sym", "auto-round", "auto_round", HALVES),
]


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))


@every_case
def test_a_client_computes_what_our_dequantised_weights_give(
    coded: Callable[[Path, str], Path], smollm2: Path, tmp_path: Path, case: tuple[str, str, str, float]
) -> None:
    check_client(smollm2, coded(smollm2, case[0]) / case[2], tmp_path, case)


@every_case
@pytest.mark.parametrize("model", list(MODELS))
def test_other_models_in_the_same_clients(
    coded: Callable[[Path, str], Path],
    real_model: Callable[[str], Path],
    tmp_path: Path,
    model: str,
    case: tuple[str, str, str, float],
) -> None:
    source = real_model(model)
    check_client(source, coded(source, case[0]) / case[2], tmp_path, case)


def test_gptqmodel_reads_rules_that_servers_find_too(tmp_path: Path) -> None:
    """It knows by what names they ask, and warns of merged layers for which these give something else."""
    rules = {
        "*.0.self_attn.[qkv]_proj": {"bits": 8},
        "*.1.self_attn.[qkv]_proj": "keep",
        "*.0.*.experts.*": {"bits": 8},
    }
    source = tiny_model("qwen3_moe", tmp_path / "in")
    folder = quantised(source, tmp_path / "out", "auto_gptq", layer_config=rules)
    shapes = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkv"]
    experts = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(2) for e in range(4) for p in ("gate", "up")]
    python = client("gptqmodel", GPTQMODEL)
    assert run(python, CONFLICTS, folder, *shapes, *experts).splitlines()[-1] == "[]"


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_we_open_what_intel_s_auto_round_writes(smollm2: Path, tmp_path: Path, symmetry: str) -> None:
    python = client("auto-round", INTEL, dependencies=True)
    run(python, WRITE, smollm2, tmp_path / "theirs", symmetry)
    (folder,) = {file.parent for file in (tmp_path / "theirs").rglob("config.json")}
    ids = prompt(smollm2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(smollm2, folder)(ids).logits, atol=1e-3, rtol=0)
