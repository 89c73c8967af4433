"""``auto-round generate``, ``chat`` and ``backends``: a quick look at a quantised folder and what can run it here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from auto_round.cli import options as o
from auto_round.cli.screen import exit_codes, quiet_transformers
from auto_round.cli.teach import Lesson
from auto_round.errors import SourceError, SpecError
from auto_round.spec.scheme import Scheme

DEFAULTS = {"device": "auto", "backend": "auto", "dtype": "auto", "tokens": "256", "scheme": "W4A16"}
OURS = ("auto-round", "gptq", "awq")  # methods whose layers `AutoRoundConfig` is for
LEAVING = ("exit", "quit", "/exit", "/quit", "/bye")

Folder = Annotated[str, typer.Argument(metavar="FOLDER", show_default=False)]
Prompt = Annotated[
    str | None, typer.Option("--prompt", help="What the text begins with.", rich_help_panel="Text", metavar="TEXT")
]
Tokens = Annotated[
    int,
    typer.Option(
        "--max_new_tokens", help="Most tokens to write (default {tokens}).", rich_help_panel="Text", metavar="N"
    ),
]
Sample = Annotated[
    bool,
    typer.Option(
        "--sample/--greedy",
        help="Draw tokens as the folder's generation config says, or take the likeliest (default --greedy).",
        rich_help_panel="Text",
    ),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="What multiplies (default {backend}: the best that fits); auto-round backends lists them.",
        rich_help_panel="Machine",
        metavar="NAME",
    ),
]
HeadBits = Annotated[
    int | None,
    typer.Option(
        "--lm_head_bits",
        help="Round an output head of 16 bits to 8 while loading, which is faster (default: leave it).",
        rich_help_panel="Machine",
        metavar="N",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the steps of one token with torch.compile: a minute at first, then faster (default: do not).",
        rich_help_panel="Machine",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Of activations (default {dtype}: the folder's).", rich_help_panel="Machine", metavar="NAME"
    ),
]

GENERATE_LESSON = Lesson(
    usage="FOLDER --prompt TEXT [FLAGS]",
    summary="Continues a text with a quantised model, as it comes, and says how fast that was.",
    defaults=DEFAULTS,
    sections={
        "Examples": (('auto-round generate ./tmp_autoround --prompt "def quicksort(a):"', "The likeliest text."),)
    },
)
CHAT_LESSON = Lesson(
    usage="FOLDER [FLAGS]",
    summary="Talks with a quantised model; an empty line, exit or Ctrl-D ends it.",
    defaults=DEFAULTS,
    sections={
        "Examples": (("auto-round chat ./tmp_autoround --sample --lm_head_bits 8", "A livelier answer, sooner."),)
    },
)
BACKENDS_LESSON = Lesson(
    usage="[FLAGS]",
    summary="Lists what can multiply with quantised weights on this machine, best first, and why the others cannot.",
    defaults=DEFAULTS,
    sections={"Examples": (("auto-round backends --scheme W2A16G64_asym", "For 2 bits with zero points."),)},
)


def generate(
    folder: Folder,
    prompt: Prompt = None,
    max_new_tokens: Tokens = int(DEFAULTS["tokens"]),
    sample: Sample = False,
    backend: BackendName = DEFAULTS["backend"],
    lm_head_bits: HeadBits = None,
    compile: Compile = False,
    dtype: Dtype = DEFAULTS["dtype"],
    device: o.Device = None,
) -> None:
    """Continue one text."""
    if not prompt:
        raise typer.BadParameter("no text to continue: --prompt TEXT")
    with exit_codes():
        from auto_round.evaluate.stream import prompt_tokens, stream

        model, tokenizer = load(folder, backend, lm_head_bits, dtype, device, compile=compile)
        typer.echo(prompt, nl=False)
        done = stream(model, tokenizer, prompt_tokens(tokenizer, prompt), max_new_tokens, sample=sample, show=_echo)
        typer.echo(f"\n\n{done}")


def chat(
    folder: Folder,
    max_new_tokens: Tokens = int(DEFAULTS["tokens"]),
    sample: Sample = False,
    backend: BackendName = DEFAULTS["backend"],
    lm_head_bits: HeadBits = None,
    compile: Compile = False,
    dtype: Dtype = DEFAULTS["dtype"],
    device: o.Device = None,
) -> None:
    """Answer line by line until there is none."""
    with exit_codes():
        from auto_round.evaluate.stream import prompt_tokens, stream

        model, tokenizer = load(folder, backend, lm_head_bits, dtype, device, compile=compile)
        messages: list[dict[str, str]] = []
        while line := _ask():
            messages.append({"role": "user", "content": line})
            ids = prompt_tokens(tokenizer, messages)
            done = stream(model, tokenizer, ids, max_new_tokens, sample=sample, show=_echo)
            messages.append({"role": "assistant", "content": done.text})
            typer.secho(f"\n[{done}]", dim=True)


def backends(scheme: o.Scheme = None, device: o.Device = None, dtype: Dtype = DEFAULTS["dtype"]) -> None:
    """List the backends."""
    with exit_codes():
        from auto_round.inference.select import ELSEWHERE, explain, ranked
        from auto_round.runtime.device import compute_dtype, resolve_device

        place = resolve_device(device or "auto")
        wanted = Scheme.parse(scheme or DEFAULTS["scheme"])
        kind = compute_dtype(dtype, place)
        reasons = explain(wanted, (4096, 4096), kind, place)
        table = Table(title=f"{wanted.name}, {str(kind).removeprefix('torch.')} on {place}", title_justify="left")
        for heading in ("backend", "also called", "here"):
            table.add_column(heading, overflow="fold")
        for entry in ranked():
            reason = reasons[entry.name]
            table.add_row(entry.name, ", ".join(entry.spellings), "yes" if reason is None else f"no: {reason}")
        here = {spelling for entry in ranked() for spelling in (entry.name, *entry.spellings)}
        for name, needs in ELSEWHERE.items():
            if name not in here:
                table.add_row(name, "", f"not in this version: needs {needs}")
        Console(highlight=False).print(table)


def load(
    folder: str, backend: str, lm_head_bits: int | None, dtype: str, device: str | None, *, compile: bool
) -> tuple[Any, Any]:
    """Open a folder as transformers does; raise SourceError when it cannot be, SpecError for what does not go with it.

    compile: see `compile_decoding`; the model then generates with a cache of fixed size.
    """
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round.formats.folder import method_of
    from auto_round.inference.loading import AutoRoundConfig
    from auto_round.runtime.device import resolve_device
    from auto_round.source.foreign import foreign

    if not (Path(folder) / "config.json").is_file():
        raise SourceError(f"{folder}: no config.json; is this the folder of a quantised model?")
    quiet_transformers()
    place = str(resolve_device(device or "auto"))
    ours = method_of(Path(folder)) in OURS
    if not ours and (backend != DEFAULTS["backend"] or lm_head_bits is not None):
        raise SpecError(
            f"{folder}: --backend and --lm_head_bits are for folders of AutoRound, GPTQ and AWQ; transformers "
            "computes with the others in ways of its own"
        )
    with foreign(f"{folder}: cannot be opened"):
        config = {"quantization_config": AutoRoundConfig(backend=backend, lm_head_bits=lm_head_bits)} if ours else {}
        model = AutoModelForCausalLM.from_pretrained(folder, **config, dtype=dtype, device_map=place)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if compile:
        from auto_round.inference.compiled import compile_decoding

        compile_decoding(model)
        model.generation_config.cache_implementation = "static"
    return model.eval(), tokenizer


def _ask() -> str:
    try:
        line = typer.prompt("\nyou", default="", show_default=False).strip()
    except typer.Abort:
        return ""
    return "" if line in LEAVING else line


def _echo(text: str) -> None:
    typer.echo(text, nl=False)
