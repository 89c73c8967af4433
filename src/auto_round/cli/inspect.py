"""``auto-round inspect FOLDER``: what a quantised folder or file holds."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from auto_round.cli import options as o
from auto_round.cli.screen import CANNOT, exit_codes, quiet_transformers
from auto_round.cli.teach import Lesson
from auto_round.report.tables import bytes_text

if TYPE_CHECKING:
    from auto_round.report.inspection import Inspection, LayerRow

INSPECT_LESSON = Lesson(
    usage="FOLDER [FLAGS]",
    summary="Shows what a quantised model holds: the scheme of every layer, sizes, what made it and which software "
    "opens it; and reads every tensor to see that it is whole. Exit code 2 when it is not.",
    defaults={},
    sections={
        "Examples": (
            ("auto-round inspect ./my-model", "A summary, one row for layers that are alike."),
            ("auto-round inspect ./my-model --layers", "Every layer."),
            ("auto-round inspect ./my-model --json --no-check", "The headers alone, for scripts."),
        )
    },
)


def inspect(
    path: o.InspectPath, layers: o.Layers = False, check: o.Check = True, json: o.JsonInspection = None
) -> None:
    """Inspect one model."""
    with exit_codes():
        from auto_round.report.inspection import inspect as run  # imports torch, which --help has no need of

        quiet_transformers()
        found = run(path, check=check)
    if json:
        typer.echo(found.to_json(), nl=False)
    else:
        show(found, every_layer=layers)
    if found.problems:
        raise typer.Exit(CANNOT)


def show(found: Inspection, *, every_layer: bool) -> None:
    """Print an inspection."""
    console = Console(highlight=False)
    console.print(Text(f"{found.path}: {found.format}, {found.detail}", style="bold"), soft_wrap=True)
    console.print(_layer_table(found.layers, every_layer), crop=False)
    console.print(
        f"{len(found.layers)} layers in {bytes_text(found.bytes_coded)} ({found.bits_per_weight:.2f} bits per weight); "
        f"all else {bytes_text(found.bytes_plain)}; {found.bits_per_parameter:.2f} bits per parameter overall"
    )
    if found.kept:
        console.print(f"{len(found.kept)} 2-D weights in the blocks are as they were, {found.kept[0]} among them")
    if found.provenance:
        console.print("made with " + ", ".join(f"{key} {value}" for key, value in found.provenance.items()))
    for client, obstacle in found.clients.items():
        text = Text("  opens in ", style="green") if obstacle is None else Text("  not in   ", style="yellow")
        console.print(text.append(client if obstacle is None else f"{client}: {obstacle}"), soft_wrap=True)
    if found.problems is None:
        console.print("tensors were not read (--no-check)")
    elif not found.problems:
        console.print("every tensor was read and is sound")
    for problem in found.problems or ():
        console.print(Text(f"damaged: {problem}", style="bold red"), soft_wrap=True)


def _layer_table(rows: tuple[LayerRow, ...], every_layer: bool) -> Table:
    """One row a layer, or one for the layers of each name inside a block and each scheme."""
    table = Table("layers", "scheme", "shape (out x in)", "bytes", title_justify="left")
    groups: dict[tuple[str, str, str], list[LayerRow]] = defaultdict(list)
    for row in rows:
        name = row.name if every_layer else ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        groups[name, row.kind, f"{row.out_features} x {row.in_features}"].append(row)
    for (name, kind, shape), members in groups.items():
        count = "" if every_layer else f"{len(members)} x "
        table.add_row(f"{count}{name}", kind, shape, bytes_text(sum(row.bytes for row in members)))
    return table
