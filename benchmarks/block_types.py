"""Our GGUF files beside those of llama.cpp's own quantiser, made from the same float file: size and quality.

    python benchmarks/block_types.py MODEL CALIBRATION EVALUATION OUT --types q4_k_m q2_k --llama PYTHON

MODEL is a folder; CALIBRATION a jsonl with a "text" in each line; EVALUATION a plain file; OUT a folder for the files,
which are kept. PYTHON is an interpreter of an environment with llama-cpp-python. llama.cpp quantises without and with
an importance matrix, which is gathered on the same calibration tokens that we tune on. All files are dequantised to
float32 by our reader before they are scored, so that no kernel colours the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound
from auto_round.evaluate.metrics import compare, evaluate_tokens
from auto_round.formats.base import Export
from auto_round.formats.gguf.architectures import Model
from auto_round.formats.gguf.mixing import FILE_TYPES
from auto_round.formats.gguf.reader import read_floats
from auto_round.formats.gguf.writer import GgufFormat
from auto_round.source.opening import open_source
from auto_round.spec.plan import Plan
from auto_round.spec.scheme import Scheme
from figures import calibration, show

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.clients import run
from tests.llama_client import QUANTISE


def main() -> None:
    """Read the arguments, make the files, score them, print and keep the result."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = calibration(options.calibration, tokenizer, options.nsamples, options.seqlen)
    floats = float_file(options)
    rows = []
    for file_type in options.types:
        files = llama_files(options, floats, tokens, file_type) if options.llama else {}
        files |= our_files(options, tokens, file_type)
        for name, (file, seconds) in files.items():
            rows.append({"type": file_type, "by": name, "bytes": file.stat().st_size, "seconds": seconds})
            rows[-1] |= score(options, tokenizer, file)
            print(json.dumps(rows[-1]), flush=True)
    settings = {key: str(value) for key, value in vars(options).items() if key in ("nsamples", "seqlen", "ours")}
    result = {"model": options.model.name, "settings": settings, "rows": rows}
    show(result, table(result), options.result)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q2_k"])
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval_samples", type=int, default=16, help="samples of 512 tokens")
    parser.add_argument("--ours", default='{"tuned": {"iters": 50, "batch_size": 4}}', help="JSON: name -> keywords")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", type=Path, help="JSON file to keep the figures in")
    return parser.parse_args()


def float_file(options: argparse.Namespace) -> Path:
    """The model as a GGUF file of its own floats."""
    source = open_source(options.model, None, options.out)
    nothing = Plan(Scheme(), (), ())
    export = Export(
        checkpoint=source.checkpoint,
        config=source.raw_config,
        plan=nothing,
        stored_names={},
        replaced={},
        tensor=_nothing,
        weight=_nothing,
        extra=(),
        provenance={},
        title=source.title,
        tokenizer=source.tokenizer,
    )
    GgufFormat("bf16").write(export, options.out, 1 << 60)
    return next(options.out.glob("*-BF16.gguf"))


def _nothing(name: str) -> Any:
    raise KeyError(name)


def llama_files(
    options: argparse.Namespace, floats: Path, tokens: list[list[int]], file_type: str
) -> dict[str, tuple[Path, float]]:
    """llama.cpp's files, without and with an importance matrix."""
    matrix = options.out / "imatrix.npz"
    if not matrix.exists():
        np.savez(matrix, **importance(options, tokens))
    files = {}
    for name, given in (("llama.cpp", None), ("llama.cpp imatrix", str(matrix))):
        file = options.out / f"{name.replace(' ', '-')}-{file_type}.gguf"
        begin = time.perf_counter()
        job = {"source": str(floats), "target": str(file), "file_type": FILE_TYPES[file_type][0], "imatrix": given}
        code = run(Path(options.llama), QUANTISE, json.dumps({**job, "threads": options.threads}))
        if code.strip() == "0":
            files[name] = (file, time.perf_counter() - begin)
        else:
            print(f"{name}: llama_model_quantize refused {file_type} ({code.strip()})", file=sys.stderr)
    return files


@torch.no_grad()
def importance(options: argparse.Namespace, tokens: list[list[int]]) -> dict[str, Any]:
    """Mean squared input of every Linear, by GGUF tensor name."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    names = Model(model.config.to_dict())
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].float().square().flatten(0, -2).sum(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(name))
    for sample in tokens:
        model(input_ids=torch.tensor([sample]), use_cache=False)
    count = len(tokens) * len(tokens[0])
    found = {names.tensor_name(f"{name}.weight") or "token_embd.weight": value for name, value in sums.items()}
    return {name: (value / count).numpy() for name, value in found.items()}


def our_files(options: argparse.Namespace, tokens: list[list[int]], file_type: str) -> dict[str, tuple[Path, float]]:
    """Our files, one for each set of keywords."""
    files = {}
    for name, keywords in json.loads(options.ours).items():
        folder = options.out / f"ours-{name}-{file_type}"
        begin = time.perf_counter()
        asked = {"nsamples": options.nsamples, "seqlen": options.seqlen, "device": "cpu", **keywords}
        tuner = AutoRound(options.model, dataset=tokens, **asked)
        tuner.quantize_and_save(folder, format=f"gguf:{file_type}", overwrite=True)
        files[f"ours {name}"] = (next(folder.glob("*.gguf")), time.perf_counter() - begin)
    return files


@torch.no_grad()
def score(options: argparse.Namespace, tokenizer: Any, file: Path) -> dict[str, Any]:
    """Compare a file with the original on the evaluation text, both in float32."""
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    loaded = model.load_state_dict({name: value.float() for name, value in read_floats(file)}, strict=False)
    if loaded.unexpected_keys:
        raise SystemExit(f"{file}: not tensors of the model: {loaded.unexpected_keys[:3]}")
    tokens = evaluate_tokens(tokenizer, options.evaluation.read_text(encoding="utf-8"), 512, options.eval_samples)
    return asdict(compare(reference, model, tokens))


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a file."""
    lines = ["| type | quantised by | MB | seconds | KL divergence | perplexity | top-1 |", "| --- " * 7 + "|"]
    for row in result["rows"]:
        cells = [row["type"], row["by"], f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}"]
        cells += [f"{row['kl_divergence']:.4f}", f"{row['perplexity']:.3f}", f"{row['top1_agreement']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    original = result["rows"][0]["perplexity_reference"] if result["rows"] else 0.0
    return "\n".join([f"{result['model']}, perplexity of the original {original:.3f}", "", *lines])


if __name__ == "__main__":
    main()
