"""A mutator of model folders and calibration data, and a runner that sees what becomes of each mutant.

Run as a program it reads {"model", "scratch", "seeds"} from standard input, as JSON, and prints one JSON line for each
seed: what was changed, how the run ended, and what is wrong with that (null when nothing is).
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 10.0  # seconds of processor time: how busy the machine is with other work is not the input's doing
HANGING = 3 * LONGEST  # seconds by the clock after which a run is killed
MEMORY = 3_000_000_000  # bytes of address space a run may take on top of what the libraries take
ODD = (None, -1, 0, 1, 3, 7, 10**9, 10**18, 0.5, -0.0, 1e300, "", "x", "../x", [], [0], {}, {"a": 1}, True, False)
SHARED = ("model.embed_tokens.weight", "lm_head.weight")
DONE, REFUSED, BAD_RESULT = 0, 2, 3


def mutate(folder: Path, draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Change a model folder in one way; return what was done and the keywords of `AutoRound` that go with it."""
    change = draw.choice(MUTATIONS)
    told = change(folder, draw)
    if isinstance(told, dict):
        return f"{change.__name__}: {str(told)[:120]}", told
    return f"{change.__name__}: {told}", {}


def a_config_value(folder: Path, draw: random.Random) -> str:
    file = folder / draw.choice(("config.json", "config.json", "generation_config.json", "tokenizer_config.json"))
    values = json.loads(file.read_text())
    name = draw.choice(sorted(values))
    if draw.random() < 0.25:
        del values[name]
        told = f"{file.name} without {name}"
    else:
        values[name] = draw.choice(ODD)
        told = f"{file.name} {name} = {values[name]!r}"
    file.write_text(json.dumps(values))
    return told


def a_config_size(folder: Path, draw: random.Random) -> str:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    name = draw.choice(sorted(key for key, value in values.items() if type(value) is int))
    values[name] = draw.choice((values[name] - 1, values[name] + 1, values[name] * 2, values[name] // 2, 10**7, -5))
    file.write_text(json.dumps(values))
    return f"{name} = {values[name]}"


def a_json_text(folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.glob("*.json")))
    text = file.read_bytes()
    place = draw.randrange(len(text))
    kind = draw.choice(("cut", "byte", "empty", "other", "deep"))
    changed = {
        "cut": text[:place],
        "byte": text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :],
        "empty": b"",
        "other": b"[1, 2, 3]",
        "deep": b"[" * 100_000,
    }[kind]
    file.write_bytes(changed)
    return f"{file.name} {kind} at {place}"


def a_missing_file(folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    return file.name


def an_index(folder: Path, draw: random.Random) -> str:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = index["weight_map"]
    name = draw.choice(sorted(names))
    kind = draw.choice(("outside", "absolute", "missing", "other shard", "gone", "odd", "unknown tensor", "not a map"))
    if kind == "gone":
        del names[name]
    elif kind == "unknown tensor":
        names["model.layers.9.extra.weight"] = names[name]
    elif kind == "not a map":
        index["weight_map"] = draw.choice(ODD)
    else:
        names[name] = {
            "outside": "../precious.safetensors",
            "absolute": str(folder.parent / "precious.safetensors"),
            "missing": "model-00009-of-00009.safetensors",
            "other shard": draw.choice(sorted(set(names.values()))),
            "odd": draw.choice(ODD),
        }[kind]
    file.write_text(json.dumps(index))
    return f"{name} {kind}"


def a_header(folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    kind = draw.choice(("dtype", "shape", "offsets", "odd", "gone", "renamed", "twice", "overlap"))
    begin, end = entry["data_offsets"]
    if kind == "dtype":
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "F8_E4M3", "U4", "nonsense", 3))
    elif kind == "shape":
        entry["shape"] = draw.choice(([end - begin], entry["shape"][::-1], [-1, 4], [1 << 40, 1 << 40], "x", [0], []))
    elif kind == "offsets":
        entry["data_offsets"] = draw.choice(([end, begin], [begin, end + 4], [begin - 4, end], [0, 1 << 60], [begin]))
    elif kind == "odd":
        entry[draw.choice(sorted(entry))] = draw.choice(ODD)
    elif kind == "gone":
        del header[name]
    elif kind == "renamed":
        header[draw.choice(("", "x" * 1000, "../x", name.upper()))] = header.pop(name)
    elif kind == "twice":
        header[name + ".copy"] = entry
    else:
        entry["data_offsets"] = [max(begin - 8, 0), max(begin - 8, 0) + end - begin]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return f"{file.name} {name} {kind}"


def a_file_length(folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    kind = draw.choice(("cut", "longer", "length", "empty", "zeros"))
    place = draw.randrange(len(data))
    lengths = (0, 1, 1 << 20, 1 << 40, (1 << 64) - 1)
    changed = {
        "cut": data[:place],
        "longer": data + b"more",
        "length": struct.pack("<Q", draw.choice(lengths)) + data[8:],
        "empty": b"",
        "zeros": bytes(len(data)),
    }[kind]
    file.write_bytes(changed)
    return f"{file.name} {kind} at {place}"


def a_weight(folder: Path, draw: random.Random) -> str:
    """Values that arithmetic does not like, in one tensor or in one element."""
    from safetensors.torch import load_file, save_file

    file = draw.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    value = draw.choice((float("nan"), float("inf"), -float("inf"), 1e38, -3e6, 0.0, 1e-40, 1e-7, -1e-45))
    whole = draw.random() < 0.5
    if whole:
        tensors[name].fill_(value)
    else:
        tensors[name].flatten()[draw.randrange(tensors[name].numel())] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {'all' if whole else 'one'} {value}"


def a_tie(folder: Path, draw: random.Random) -> str:
    """Say that embedding and head are one when the file has both, or take one away."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = draw.random() < 0.5
    (folder / "config.json").write_text(json.dumps(config))
    gone = draw.choice((*SHARED, None))
    if gone:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"].pop(gone)
        tensors = load_file(file)
        del tensors[gone]
        save_file(tensors, file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"tied {config['tie_word_embeddings']}, without {gone}"


def a_pickle(folder: Path, draw: random.Random) -> str:
    """A pickle that would leave a trace if it were opened, alone or beside the weights."""
    alone = draw.random() < 0.5
    if alone:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
    trace = str(folder.parent / "pwned")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(V" + trace.encode() + b"\ntR.")
    return f"alone {alone}"


def tokens(folder: Path, draw: random.Random) -> dict[str, Any]:
    rows: list[Any] = [[draw.randrange(3, 90) for _ in range(32)] for _ in range(8)]
    row, place = draw.randrange(8), draw.randrange(32)
    kind = draw.choice(("value", "row", "all", "texts"))
    if kind == "value":
        rows[row][place] = draw.choice((-1, 128, 10**6, 10**30, 0.5, None, "a", True, [1]))
    elif kind == "row":
        rows[row] = draw.choice(([], [5], [7] * 32, None, 3, "text", [[1, 2]], range(3)))
        rows[row] = list(rows[row]) if isinstance(rows[row], range) else rows[row]
    elif kind == "all":
        rows = draw.choice(
            ([], [[]], [[]] * 8, {}, 5, None, "no_such_file.txt", [None] * 8, "", "a,b", "builtin:num=x")
        )
    else:
        rows = draw.choice(([""] * 8, ["\0" * 100] * 8, ["x"] * 8, ["\ud800" * 50] * 8, ["日本語" * 50] * 8))
    return {"dataset": rows}


MUTATIONS: tuple[Callable[[Path, random.Random], str | dict[str, Any]], ...] = (
    a_config_value,
    a_config_value,
    a_config_size,
    a_json_text,
    a_missing_file,
    an_index,
    a_header,
    a_header,
    a_file_length,
    a_weight,
    a_tie,
    a_pickle,
    tokens,
)


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


def attempt(model: Path, scratch: Path, seed: int) -> dict[str, Any]:
    """Make one mutant, run it in a process of its own, and judge."""
    draw = random.Random(seed)
    place = scratch / f"m{seed}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "precious.safetensors").write_bytes((model / "model-00001-of-00002.safetensors").read_bytes())
    shutil.copytree(model, place / "model")
    told, keywords = mutate(place / "model", draw)
    recipe = draw.choice(("rtn", "tuned"))
    before = _snapshot(place)
    code, seconds = _child(place, recipe, keywords)
    after = _snapshot(place)
    output = str(place / "out")
    touched = [name for name in after if after[name] != before.get(name) and not name.startswith(output)]
    touched += [name for name in before if name not in after]
    kept = f"{place / '.out.auto-round'}/"  # finished blocks of a run that failed later are the run's own
    touched = [name for name in touched if Path(name).name != "stderr" and not name.startswith(kept)]
    wrong = None
    if code not in (DONE, REFUSED, BAD_RESULT):
        wrong = f"exit code {code}: {(place / 'stderr').read_text(errors='replace')[-1500:]}"
    elif seconds > LONGEST:
        wrong = f"took {seconds:.1f} s"
    elif touched or (place / "pwned").exists():
        wrong = f"touched {touched}"
    elif (code == REFUSED) == (place / "out").exists():
        wrong = f"exit code {code}, and the output folder is {'there' if (place / 'out').exists() else 'not there'}"
    message = (place / "stderr").read_text(errors="replace").strip().splitlines()
    shutil.rmtree(place)
    return {
        "seed": seed,
        "change": told,
        "recipe": recipe,
        "code": code,
        "seconds": round(seconds, 2),
        "said": message[-1][:300] if message else "",
        "wrong": wrong,
    }


def _child(place: Path, recipe: str, keywords: dict[str, Any]) -> tuple[int, float]:
    """Exit code of a process of its own, and its seconds of processor time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(place / "stderr", os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 2)
            code = _run(place, recipe, keywords)
        finally:  # never back into the parent's code
            if code == 1:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
    deadline, ended = time.monotonic() + HANGING, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, status, used = os.wait4(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def _run(place: Path, recipe: str, keywords: dict[str, Any]) -> int:
    from auto_round import AutoRound
    from auto_round.errors import AutoRoundError, CheckError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    settings: dict[str, Any] = {"group_size": 32, "device": "cpu", "compute_dtype": "float32"}
    tuned = {"iters": 1, "nsamples": 8, "seqlen": 32, "batch_size": 4, "dataset": ["the quick brown fox. " * 8] * 8}
    settings |= tuned if recipe == "tuned" else {"recipe": "rtn"}
    try:
        AutoRound(place / "model", **{**settings, **keywords}).quantize_and_save(place / "out")
    except CheckError as error:
        print(error, file=sys.stderr)
        return BAD_RESULT
    except AutoRoundError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return REFUSED
    return DONE


if __name__ == "__main__":
    import logging

    import torch
    from transformers.utils import logging as chatter

    import auto_round.api  # noqa: F401  loaded before the first fork

    torch.set_num_threads(1)
    chatter.set_verbosity_error()
    logging.disable(logging.ERROR)
    asked = json.load(sys.stdin)
    for each in asked["seeds"]:
        print(json.dumps(attempt(Path(asked["model"]), Path(asked["scratch"]), each)), flush=True)
