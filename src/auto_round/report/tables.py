"""What a terminal shows when a run is over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from auto_round.report.record import RunReport
from auto_round.runtime.events import BlockStats


def bytes_text(count: int) -> str:
    """Bytes for people, in units of 1000: 98.4 MB."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def seconds_text(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def loss_summary(blocks: Sequence[BlockStats]) -> str | None:
    """One line on what tuning gained over plain rounding, as geometric means over the blocks; None if not measured.

    Ratios, since the errors of the last blocks are larger by orders of magnitude and would be all that a mean shows.
    """
    ratios = [
        (b.loss_start / b.loss_plain, b.loss_end / b.loss_plain)
        for b in blocks
        if b.loss_plain and b.loss_start and b.loss_end
    ]
    if not ratios:
        return None
    start, end = (math.exp(sum(math.log(r[i]) for r in ratios) / len(ratios)) for i in (0, 1))
    return f"{start:.0%} of plain rounding's at the start, {end:.0%} at the end (mean over {len(ratios)} blocks)"


def snippet(folder: str, format: str = "auto_round") -> str:
    """Some lines of Python that load `folder`, which holds `format`."""
    if format.startswith("gguf:"):
        return "\n".join(
            (
                "from pathlib import Path",
                "from llama_cpp import Llama",
                f'model = Llama(str(next(Path({folder!r}).glob("*.gguf"))))',
            )
        )
    return "\n".join(
        (
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained({folder!r}, device_map="auto")',
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        )
    )


def closing_table(report: RunReport) -> Group:
    """The whole run at a glance, and how to load what it made."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(report):
        table.add_row(label, Text(value))
    load = Text(
        snippet(report.folders[0].path, report.folders[0].format), style="cyan", no_wrap=True, overflow="ignore"
    )
    return Group(Text(), table, Text("\nLoad it:", style="bold"), load)


def _rows(report: RunReport) -> list[tuple[str, str]]:
    before, after = report.bytes_before, report.bytes_after
    smaller = f", {before / after:.1f} times smaller" if before > after > 0 else ""
    rows = [
        ("Model", report.model),
        ("Size", f"{bytes_text(before)} before, {bytes_text(after)} after{smaller}"),
        (
            "Scheme",
            f"{report.scheme}, {report.bits_per_weight:.2f} bits per weight in {report.layers_quantised} layers",
        ),
    ]
    rows += [("Kept", kept)] if (kept := _kept(report)) else []
    rows.append(("Calibration", _calibration(report)))
    rows += [("Block error", summary)] if (summary := loss_summary(report.blocks)) else []
    rows += [("Distance", _distance(report.check["findings"][-1]))] if report.check else []
    if report.seconds:
        rows += [("Time", f"{seconds_text(report.seconds)} on {report.device} in {report.compute_dtype}")]
        rows += [("Peak memory", _memory(report))]
    return rows + [
        ("Saved", f"{folder.path} ({folder.format}, {bytes_text(folder.bytes)})") for folder in report.folders
    ]


def _kept(report: RunReport) -> str:
    counts: dict[str, int] = {}
    for layer in report.layers_kept:
        counts[layer.reason] = counts.get(layer.reason, 0) + 1
    return "; ".join(f"{count} {'layer' if count == 1 else 'layers'}: {reason}" for reason, count in counts.items())


def _calibration(report: RunReport) -> str:
    if report.calibration is None:
        return "none needed"
    facts = report.calibration
    return (
        f"{facts['samples']} samples, {facts['tokens']} tokens from {facts['source']} (sha256 {facts['digest'][:12]})"
    )


def _distance(finding: Mapping[str, Any]) -> str:
    numbers = [finding[name] for name in ("kl_divergence", "perplexity_ratio", "top1_agreement")]
    if any(number is None for number in numbers):  # JSON has no word for what is not finite
        return "not a number: the result is broken"
    return (
        f"KL divergence {numbers[0]:.3g} nats, perplexity x {numbers[1]:.3g}, same likeliest token {numbers[2]:.0%}, "
        "on a few samples"
    )


def _memory(report: RunReport) -> str:
    resident = bytes_text(report.peak_rss_bytes)
    if report.peak_device_bytes is None:
        return resident
    return f"{resident}, {bytes_text(report.peak_device_bytes)} on {report.device}"
