"""One way of running one folder, measured in a process of its own; printed as one line of JSON.

It needs torch and transformers alone, so that the interpreter of another project's environment can run it too. With
``--kind llama`` it needs llama_cpp and the folder is a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "def quicksort(values):\n    "
NEW_TOKENS = 64
PREFILL_TOKENS = 400


def seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Times of `repeats` runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def resident_bytes() -> int:
    """Memory of this process now, pages of mapped files that were touched included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def use_instruction_set(index: int) -> None:
    """Let the native kernel of this process take an instruction set below the best."""
    from auto_round.inference.kernels import native

    found = native.library()
    assert isinstance(found, native.Library)
    isas = tuple(isa for isa in found.isas if isa <= index)
    native.library = lambda: native.Library(found.linear, found.dense, isas)


def with_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding at batch 1 through generate, and one forward pass over a prompt."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if args.isa is not None:
        use_instruction_set(args.isa)

    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "device_map": "cpu"}
    if args.backend or args.head_bits:
        from auto_round import AutoRoundConfig

        options["quantization_config"] = AutoRoundConfig(backend=args.backend or "auto", lm_head_bits=args.head_bits)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.device("meta"):  # what is imported for this architecture is not the model
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.folder))
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(args.folder, **options).eval()
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)  # reads every weight of the layers and the head
    loaded = resident_bytes() - before
    ids = torch.arange(PREFILL_TOKENS)[None] + 1000
    settings = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens, "do_sample": False}
    if args.compile:
        from auto_round import compile_decoding

        settings["cache_implementation"] = "static"
        compile_decoding(model)
    with torch.no_grad():
        decode = seconds(lambda: model.generate(**inputs, **settings), args.repeats)
        prefill = seconds(lambda: model(ids, logits_to_keep=1), args.repeats)
        text = tokenizer.decode(model.generate(**inputs, **settings)[0, -args.new_tokens :])
    return figures(decode, prefill, args.new_tokens) | {
        "loaded_bytes": loaded,
        "threads": torch.get_num_threads(),
        "text": text[:80],
    }


def with_llama(args: argparse.Namespace) -> dict[str, Any]:
    """The same in llama.cpp."""
    from llama_cpp import Llama

    model = Llama(args.folder, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
    prompt = model.tokenize(PROMPT.encode())

    def decode() -> None:
        model.reset()
        for count, _ in enumerate(model.generate(prompt, temp=0.0, top_k=1), 1):
            if count == args.new_tokens:
                return

    def prefill() -> None:
        model.reset()
        model.eval([1000 + i for i in range(PREFILL_TOKENS)])

    return figures(seconds(decode, args.repeats), seconds(prefill, args.repeats), args.new_tokens)


def figures(decode: list[float], prefill: list[float], new_tokens: int) -> dict[str, Any]:
    """Tokens per second: medians, and all."""
    speeds = [new_tokens / s for s in decode]
    reading = [PREFILL_TOKENS / s for s in prefill]
    return {
        "decode": statistics.median(speeds),
        "prefill": statistics.median(reading),
        "decode_all": [round(s, 2) for s in speeds],
        "prefill_all": [round(s, 1) for s in reading],
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--kind", choices=("transformers", "llama"), default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend")
    parser.add_argument("--head_bits", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--isa", type=int, help="the native kernel's instruction set, as an index into its list")
    parser.add_argument("--new_tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result = with_llama(args) if args.kind == "llama" else with_transformers(args)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
