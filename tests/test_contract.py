"""The commands and snippets that users type, on real models: each in a process of its own, as it is typed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from auto_round import AutoRound
from auto_round.load import dequantized_state_dict, load_qtensors

pytestmark = pytest.mark.slow

# What keeps a command that would tune for hours down to seconds.
SHORT = ("--iters", "1", "--nsamples", "16", "--seqlen", "128", "--dataset", "builtin", "--device", "cpu")

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu", torch_dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]))
"""

API = """
import sys
from auto_round import AutoRound
autoround = AutoRound(sys.argv[1], bits=4, group_size=128, sym=True, nsamples=16, seqlen=128, iters=1,
                      low_gpu_mem_usage=True, dataset="builtin", device="cpu",
                      layer_config={"model.layers.6.self_attn.o_proj": {"bits": 2, "group_size": 32}})
autoround.quantize_and_save(sys.argv[2], format="auto_round")
"""


def typed(*words: object) -> str:
    """Run words in a fresh process; return its standard output, show its standard error when it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def command(program: str, model: Path, output: Path, *flags: str) -> None:
    words = ["--model", model, "--bits", "4", "--group_size", "128", "--output_dir", output]
    typed(Path(sysconfig.get_path("scripts")) / program, *words, *flags)


def test_the_command_line_ends_in_a_folder_that_speaks(smollm2: Path, tmp_path: Path) -> None:
    command("auto-round", smollm2, tmp_path / "tmp_autoround", *SHORT)
    assert "Paris" in typed(sys.executable, "-c", LOAD, tmp_path / "tmp_autoround")


@pytest.mark.parametrize(
    ("program", "flags"),
    [("auto-round-best", (*SHORT, "--finish_iters", "2")), ("auto-round-light", SHORT), ("auto-round-rtn", ())],
)
def test_every_command_is_installed(program: str, flags: tuple[str, ...], llama_folder: Path, tmp_path: Path) -> None:
    command(program, llama_folder, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_snippet_ends_in_a_folder_that_speaks(smollm2: Path, tmp_path: Path) -> None:
    typed(sys.executable, "-c", API, smollm2, tmp_path / "out")
    assert "Paris" in typed(sys.executable, "-c", LOAD, tmp_path / "out")


def test_an_opt_of_125m_with_the_layer_of_the_example(tmp_path: Path) -> None:
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig()).save_pretrained(tmp_path / "opt")  # the defaults are those of opt-125m
    name = "model.decoder.layers.6.self_attn.out_proj"
    tokens = torch.randint(3, 50000, (4, 64), generator=torch.Generator().manual_seed(0))
    tuner = AutoRound(
        tmp_path / "opt",
        bits=4,
        group_size=128,
        iters=1,
        dataset=tokens.tolist(),
        nsamples=4,
        seqlen=64,
        device="cpu",
        compute_dtype="float32",
        layer_config={name: {"bits": 2, "group_size": 32}},
    )
    tuner.quantize_and_save(tmp_path / "out")
    scheme = dict(load_qtensors(tmp_path / "out"))[name].scheme
    assert (scheme.bits, scheme.group_size) == (2, 32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "opt", dtype=torch.float32)
    plain.load_state_dict(
        {key: value.float() for key, value in dequantized_state_dict(tmp_path / "out").items()}, strict=False
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
