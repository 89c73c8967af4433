"""Our tuner and, when asked, Intel's auto-round on the same model, tokens, steps and batch: time, memory, quality.

    python benchmarks/quantize.py MODEL CALIBRATION EVALUATION [EVALUATION ...] --scheme W4A16G128 --peer PYTHON

MODEL is a folder; CALIBRATION a jsonl with a "text" in each line; EVALUATION texts are plain files. PYTHON is an
interpreter of an environment with auto-round 0.16.1. Each tuner runs in a process of its own, alone, one after the
other; both results are dequantised to float32 by our reader before they are scored, so no kernel colours them.
Run nothing else meanwhile: two processes with OpenMP threads slow each other by far more than a half.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.evaluate.metrics import compare, evaluate_tokens
from auto_round.load import dequantized_state_dict
from auto_round.spec.scheme import Scheme
from figures import calibration, show

OURS = """
import json, logging, sys, time
begin = time.perf_counter()
from auto_round import AutoRound
from auto_round.runtime.device import peak_resident_bytes
logging.basicConfig(level=logging.INFO, format="%(message)s")
job = json.loads(sys.argv[1])
tuner = AutoRound(job["model"], dataset=json.load(open(job["tokens"])), **{**job["common"], **job["ours"]})
report = tuner.quantize_and_save(job["output"])
print(json.dumps({"seconds": time.perf_counter() - begin, "tuning_seconds": report.seconds,
                  "peak_rss_bytes": peak_resident_bytes(), "compute_dtype": report.compute_dtype,
                  "finishing": report.finishing}))
"""

PEER = """
import json, resource, sys, time
begin = time.perf_counter()
import torch
from auto_round import AutoRound, __version__
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.loads(sys.argv[1])
if __name__ == "__main__":
    tokens = [torch.tensor([row]) for row in json.load(open(job["tokens"]))]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tuner = AutoRound(model, tokenizer, dataset=tokens, device_map="cpu", enable_torch_compile=True,
                      **job["common"], **job["peer"])
    tuner.quantize_and_save(job["output"], format="auto_round")
    print()
    print(json.dumps({"seconds": time.perf_counter() - begin, "version": __version__,
                      "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def main() -> None:
    """Read the arguments, run both tuners, score, print and keep the result."""
    options = arguments()
    scheme = Scheme.parse(options.scheme)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        tokens = Path(scratch) / "tokens.json"
        samples = calibration(
            options.calibration, AutoTokenizer.from_pretrained(options.model), options.nsamples, options.seqlen
        )
        tokens.write_text(json.dumps(samples), encoding="utf-8")
        common = {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.sym,
            "iters": options.iters,
            "lr": options.lr,
            "nsamples": options.nsamples,
            "seqlen": options.seqlen,
            "batch_size": options.batch_size,
        }
        job = {
            "model": str(options.model),
            "tokens": str(tokens),
            "common": {key: value for key, value in common.items() if value is not None},
            "ours": json.loads(options.ours),
            "peer": json.loads(options.peer_options),
        }
        settings = {**job["common"], "ours": job["ours"], "peer": job["peer"]}
        earlier = earlier_peer(options, scheme, settings) if options.peer_result else {}
        ours = {} if options.no_ours else {"ours": job["ours"]}
        ours |= {f"ours {words}": json.loads(words) for words in options.also}
        runs = {
            name: tune(sys.executable, OURS, {**job, "ours": keywords, "output": f"{scratch}/{name}"})
            for name, keywords in ours.items()
        }
        if options.peer:
            runs["peer"] = tune(options.peer, PEER, {**job, "output": f"{scratch}/peer"}, "-I")
        scores = score(options, {name: _model_folder(Path(scratch) / name) for name in runs})
    result = {
        "model": options.model.name,
        "scheme": scheme.name,
        "settings": settings,
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "runs": {name: {**run, "scores": scores[name]} for name, run in runs.items()} | earlier,
    }
    show(result, table(result), options.result)


def earlier_peer(options: argparse.Namespace, scheme: Scheme, settings: dict[str, Any]) -> dict[str, Any]:
    """The peer's run out of an earlier result of the same job; its seconds are those of another hour or machine."""
    file = options.peer_result
    earlier = json.loads(file.read_text(encoding="utf-8"))
    peer = earlier["runs"]["peer"]
    texts = [text.name for text in options.evaluation]
    there = [earlier["model"], earlier["scheme"], {**earlier["settings"], "ours": None}, list(peer["scores"])]
    here = [options.model.name, scheme.name, {**settings, "ours": None}, texts]
    for found, asked in zip(there, here, strict=True):
        if found != asked:
            raise SystemExit(f"{file}: made with {found}, here {asked}")
    return {"peer": {**peer, "from": file.name}}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path, nargs="+")
    parser.add_argument("--scheme", default="W4A16G128")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--lr", type=float, default=None, help="given to both; without it each uses its own default")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--eval_samples", type=int, default=16, help="samples of 512 tokens of each evaluation text")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer", help="Python of an environment with auto-round 0.16.1")
    peer.add_argument("--peer_result", type=Path, help="take the peer's figures from this earlier result instead")
    parser.add_argument("--no_ours", action="store_true", help="leave out the run of --ours")
    parser.add_argument("--ours", default="{}", help="JSON of further keywords for our AutoRound")
    parser.add_argument("--also", action="append", default=[], help="the same for one more run of ours; any number")
    parser.add_argument("--peer_options", default="{}", help="JSON of further keywords for the peer's AutoRound")
    parser.add_argument("--scratch", default=None, help="where the outputs lie until they are scored")
    parser.add_argument("--result", type=Path, help="JSON file to keep the figures in")
    return parser.parse_args()


def tune(python: str, code: str, job: dict[str, Any], *flags: str) -> dict[str, Any]:
    """Run one tuner in a process of its own, with the flags of its Python; its last line is its result."""
    words = [python, *flags, "-c", code, json.dumps(job)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(result), file=sys.stderr)
    return result


def _model_folder(folder: Path) -> Path:
    """The peer puts its model into a folder of its own below the one it is given."""
    return next(file.parent for file in sorted(folder.rglob("config.json")))


@torch.no_grad()
def score(options: argparse.Namespace, folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Compare every folder with the original on every text, all in float32."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    scores: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        state = {key: value.float() for key, value in dequantized_state_dict(folder).items()}
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise SystemExit(f"{name}: {len(unexpected)} tensors of the folder are not the model's: {unexpected[0]}")
        scores[name] = {}
        for file in options.evaluation:
            tokens = evaluate_tokens(tokenizer, file.read_text(encoding="utf-8"), 512, options.eval_samples)
            scores[name][file.name] = asdict(compare(reference, model, tokens))
    return scores


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a tuner, then ours by the peer's."""
    runs = result["runs"]
    texts = list(next(iter(runs.values()))["scores"])
    heads = ["", "seconds", "peak RSS MB"]
    for text in texts:
        heads += [f"KL {text}", "perplexity", "top-1"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, run in runs.items():
        cells = [name, f"{run['seconds']:.0f}", f"{run['peak_rss_bytes'] / 1e6:.0f}"]
        for text in texts:
            figures = run["scores"][text]
            cells += [f"{figures['kl_divergence']:.4f}", f"{figures['perplexity']:.3f}"]
            cells += [f"{figures['top1_agreement']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    peer = runs.get("peer")
    for name, ours in runs.items():
        if peer is None or name == "peer":
            continue
        cells = [f"ratio of {name}", f"{ours['seconds'] / peer['seconds']:.2f}"]
        cells.append(f"{ours['peak_rss_bytes'] / peer['peak_rss_bytes']:.2f}")
        for text in texts:
            a, b = ours["scores"][text], peer["scores"][text]
            cells += [f"{a['kl_divergence'] / b['kl_divergence']:.2f}"]
            excess = [math.log(f["perplexity"] / f["perplexity_reference"]) for f in (a, b)]
            cells += [f"{excess[0] / excess[1]:.2f} of the log excess", ""]
        lines.append("| " + " | ".join(cells) + " |")
    title = f"{result['model']} {result['scheme']} on {result['machine']['cpu']}: {json.dumps(result['settings'])}"
    original = next(iter(runs.values()))["scores"]
    lines.append(
        "original perplexity: " + ", ".join(f"{t} {f['perplexity_reference']:.3f}" for t, f in original.items())
    )
    return "\n".join([title, "", *lines])


def cpu_name() -> str:
    """The processor's model name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
