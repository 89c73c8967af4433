"""What a run would do, before it does it: one record, its JSON, and how a terminal shows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from auto_round.report.tables import bytes_text, seconds_text


@dataclass(frozen=True)
class ForecastLayer:
    """One Linear: its shape [out_features, in_features], its scheme ("kept" if none), why, and stored bits a weight."""

    name: str
    shape: tuple[int, int]
    scheme: str
    reason: str
    bits_per_weight: float


@dataclass(frozen=True)
class ForecastFormat:
    """One output. files: weight file -> bytes, exact. other_bytes: files copied beside them.

    clients: software -> what keeps it from opening the result, None if nothing does.
    """

    format: str
    files: Mapping[str, int]
    other_bytes: int
    clients: Mapping[str, str | None]

    @property
    def bytes(self) -> int:
        """Bytes of the folder, but for a few thousand of configs."""
        return sum(self.files.values()) + self.other_bytes


@dataclass(frozen=True)
class Forecast:
    """The whole run.

    bits_per_weight: mean over quantised layers, scales and zero points counted. journal_bytes: finished blocks on disk
    while it runs. disk_bytes: journal with outputs or, before them, activations. memory: stage -> peak resident bytes
    of the host. device_memory: peak on the accelerator that computes, None when there is none. seconds: part -> time.
    activations: "in memory" or "on disk". samples_per_forward: how many samples go through a block at once in a step.
    problems: for people.
    """

    model: str
    model_bytes: int
    parameters: int
    recipe: Mapping[str, object]
    layers: tuple[ForecastLayer, ...]
    bits_per_weight: float
    formats: tuple[ForecastFormat, ...]
    journal_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    memory: Mapping[str, int]
    device_memory: int | None
    memory_free_bytes: int
    activations: str
    samples_per_forward: int
    seconds: Mapping[str, float]
    device: str
    compute_dtype: str
    problems: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory of any stage."""
        return max(self.memory.values())

    @property
    def total_seconds(self) -> float:
        """Time of all parts."""
        return sum(self.seconds.values())

    def to_json(self) -> str:
        """Everything, with the sums that are derived from it."""
        record = dataclasses.asdict(self)
        record["peak_bytes"], record["total_seconds"] = self.peak_bytes, self.total_seconds
        for entry, format in zip(record["formats"], self.formats, strict=True):
            entry["bytes"] = format.bytes
        return json.dumps({"forecast": 1, **record}, indent=2) + "\n"


def forecast_table(forecast: Forecast) -> Group:
    """The forecast at a glance: layers by kind, then sizes, memory, time, who opens it, and problems."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in _rows(forecast):
        facts.add_row(label, Text(value))
    parts: list[RenderableType] = [_layer_table(forecast), Text(), facts]
    if forecast.problems:
        parts.append(Text("\nTo know before you start", style="bold yellow"))
        parts += [Text(f"- {problem}") for problem in forecast.problems]
    return Group(*parts)


def _layer_table(forecast: Forecast) -> Table:
    """Layers that share shape, scheme and reason in one row."""
    table = Table(title=f"\n{forecast.model}", title_justify="left")
    for heading in ("layers", "shape", "scheme", "bits", "why", "such as"):
        table.add_column(heading, justify="right" if heading in ("layers", "bits") else "left", overflow="fold")
    kinds: dict[ForecastLayer, list[str]] = {}
    for layer in forecast.layers:
        kinds.setdefault(dataclasses.replace(layer, name=""), []).append(layer.name)
    for kind, names in kinds.items():
        shape = f"{kind.shape[0]} x {kind.shape[1]}"
        row = (f"{len(names)}", shape, kind.scheme, f"{kind.bits_per_weight:.2f}", kind.reason, names[0])
        table.add_row(*map(Text, row))
    return table


def _rows(forecast: Forecast) -> list[tuple[str, str]]:
    rows = [("Bits per weight", f"{forecast.bits_per_weight:.3f} in quantised layers")]
    for entry in forecast.formats:
        smaller = f"{forecast.model_bytes / entry.bytes:.2f} times smaller" if entry.bytes else ""
        rows.append((entry.format, f"{bytes_text(entry.bytes)} in {len(entry.files)} weight files, {smaller}"))
        opened = [name for name, obstacle in entry.clients.items() if obstacle is None]
        rows.append(("", f"opens in {', '.join(opened) or 'nothing known'}"))
        rows += [("", f"not in {name}: {obstacle}") for name, obstacle in entry.clients.items() if obstacle]
    stages = ", ".join(f"{stage} {bytes_text(count)}" for stage, count in forecast.memory.items())
    free = bytes_text(forecast.memory_free_bytes)
    rows.append(("Peak memory", f"{bytes_text(forecast.peak_bytes)} of {free} available ({stages})"))
    if forecast.device_memory is not None:
        rows.append(("", f"{bytes_text(forecast.device_memory)} on {forecast.device}"))
    rows.append(
        ("Activations", f"{forecast.activations}; {forecast.samples_per_forward} samples through a block at once")
    )
    disk = f"{bytes_text(forecast.disk_bytes)} of {bytes_text(forecast.disk_free_bytes)} free"
    rows.append(("Disk", f"{disk} ({bytes_text(forecast.journal_bytes)} of it for finished blocks while it runs)"))
    parts = ", ".join(f"{part} {seconds_text(seconds)}" for part, seconds in forecast.seconds.items())
    place = f"on {forecast.device} in {forecast.compute_dtype}"
    rows.append(("Time", f"about {seconds_text(forecast.total_seconds)} {place} ({parts})"))
    return rows
