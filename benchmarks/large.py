"""A model far larger than the memory it is quantised in: foreseen, rounded within 3 GB, tuned within 6 GB.

    python -m benchmarks.large FOLDER [--shape 8b|1b] [--blocks 32] [--part write|round|tune]

Writes a random Llama-shaped model of 8 (or 1.5) billion parameters into FOLDER, block by block, unless it is there;
plans and rounds it, plans and tunes its first two blocks, and keeps forecast and measurement side by side in
benchmarks/results/large.json. Run it from the repository's root, and delete FOLDER. --blocks: fewer of that shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

RESULT = Path(__file__).parent / "results" / "large.json"
EVERY = {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        **EVERY,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": 16,
        **EVERY,
    },
}
TUNED_BLOCKS = 2


def write(folder: Path, made: dict[str, Any]) -> None:
    """One shard a block, one for the embedding, one for the head; every value is normal with deviation 0.02."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    hidden, inner, vocabulary = made["hidden_size"], made["intermediate_size"], made["vocab_size"]
    blocks, narrow = made["num_hidden_layers"], hidden // 4  # a head of keys and values to 4 of queries
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shards: list[dict[str, Any]] = [{"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}]
    shards += [{f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()} for i in range(blocks)]
    shards.append({"lm_head.weight": (vocabulary, hidden)})
    for number, shapes in enumerate(shards):
        _shard(folder / f"shard-{number:03d}.safetensors", shapes, noise.roll(104729 * number))
    index(folder, {name: f"shard-{number:03d}.safetensors" for number, shapes in enumerate(shards) for name in shapes})
    LlamaConfig(**made, architectures=["LlamaForCausalLM"]).save_pretrained(folder)


def _shard(file: Path, shapes: Mapping[str, Any], noise: torch.Tensor) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for place, shape in enumerate(shapes.values()):
            left = torch.Size(shape).numel()
            flat = torch.ones(left).bfloat16() if len(shape) == 1 else noise.roll(7919 * place)
            while left:
                part = flat[:left]
                f.write(part.view(torch.uint8).numpy().data)
                left -= len(part)


def index(folder: Path, owners: Mapping[str, str]) -> None:
    """The index of a sharded model."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def first_blocks(folder: Path, part: Path, blocks: int) -> Path:
    """A model of the first blocks, its shards linked to those of the whole."""
    part.mkdir()
    owners = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {n: f for n, f in owners.items() if "layers." not in n or int(n.split(".")[2]) < blocks}
    for name in set(kept.values()):
        (part / name).hardlink_to(folder / name)
    index(part, kept)
    config = json.loads((folder / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return part


CHILD = """
import json, sys, time
begin = time.perf_counter()
import torch
from auto_round import AutoRound
from auto_round.runtime.device import peak_resident_bytes
settings, output, saving = json.loads(sys.argv[1])
if "iters" in settings:
    draw = torch.Generator().manual_seed(1)
    settings["dataset"] = torch.randint(0, 128000, (settings["nsamples"], settings["seqlen"]), generator=draw)
tuner = AutoRound(**settings)
imported = time.perf_counter() - begin
if saving is None:
    begin = time.perf_counter()
    plan = json.loads(tuner.plan(output).to_json())
    print(json.dumps({"seconds_of_planning": time.perf_counter() - begin, **plan}))
else:
    begin = time.perf_counter()
    report = tuner.quantize_and_save(output, **saving)
    print(json.dumps({"seconds": time.perf_counter() - begin, "import_seconds": imported, "check": report.check,
                      "peak_bytes": peak_resident_bytes(), "bytes": report.bytes_after}))
"""


def _child(settings: dict[str, Any], output: Path, saving: dict[str, Any] | None) -> dict[str, Any]:
    words = [sys.executable, "-c", CHILD, json.dumps([settings, str(output), saving])]
    said = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    answer: dict[str, Any] = json.loads(said)
    return answer


def measured(settings: dict[str, Any], output: Path, saving: dict[str, Any]) -> dict[str, Any]:
    """Plan, then do it, each in a process of its own; both side by side."""
    plan, done = (_child(settings, output, way) for way in (None, saving))
    weights = sum(file.stat().st_size for file in output.glob("*.safetensors*"))
    shutil.rmtree(output)
    foreseen = {"peak_bytes": plan["peak_bytes"], "seconds": plan["total_seconds"]}
    foreseen["weight_bytes"] = sum(plan["formats"][0]["files"].values())
    done["weight_bytes"] = weights
    model = Path(settings["model"])
    return {
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "settings": {**settings, "model": model.name},
        "foreseen": foreseen,
        "measured": done,
        "foreseen_over_measured": {name: round(foreseen[name] / done[name], 3) for name in foreseen},
        "stages": {"memory": plan["memory"], "seconds": plan["seconds"]},
        "seconds_of_planning": round(plan["seconds_of_planning"], 2),
        "compute_dtype": plan["compute_dtype"],
    }


def main() -> None:
    """Write the model if need be, then both runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--part", choices=("write", "round", "tune"))
    given = parser.parse_args()
    if not given.folder.exists():
        begin = time.monotonic()
        made = SHAPES[given.shape]
        write(given.folder, {**made, "num_hidden_layers": given.blocks or made["num_hidden_layers"]})
        print(f"written in {time.monotonic() - begin:.0f} s")
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found = kept.setdefault(given.shape, {})
    output = given.folder.with_name(given.folder.name + "-out")
    settings = {"model": str(given.folder), "group_size": 128, "device": "cpu"}
    if given.part in ("round", None):
        rounding = {**settings, "recipe": "rtn", "max_memory": "3GB"}
        found["rounded"] = measured(rounding, output, {"enable_check": False})
    if given.part in ("tune", None):
        part = given.folder.with_name(given.folder.name + "-part")
        shutil.rmtree(part, ignore_errors=True)
        settings["model"] = str(first_blocks(given.folder, part, TUNED_BLOCKS))
        tuning = {"iters": 2, "nsamples": 4, "seqlen": 128, "batch_size": 2, "max_memory": "6GB"}
        found["tuned_two_blocks"] = measured({**settings, **tuning}, output, {})
        shutil.rmtree(part)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(kept, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
