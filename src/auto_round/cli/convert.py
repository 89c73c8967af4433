"""``auto-round convert SRC --format X OUT``: a quantised model in another format."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict

import typer

from auto_round.cli import options as o
from auto_round.cli.screen import exit_codes, quiet_transformers
from auto_round.cli.teach import Lesson
from auto_round.report.live import LiveListener

CONVERT_LESSON = Lesson(
    usage="SOURCE --format NAME FOLDER [FLAGS]",
    summary="Writes a quantised model in another format: the same codes, scales and zero points, read back and "
    "compared. Where the other format cannot hold them it says why, and which formats can.",
    defaults={"format": "none", "output_dir": "none"},
    sections={
        "Examples": (
            ("auto-round convert ./my-gptq-model --format auto_round ./my-model", "Read GPTQ, AWQ and others as ours."),
            (
                "auto-round convert ./my-model --format auto_awq ./out --requantize --scheme W4A16G128",
                "Round again what AWQ cannot hold, and say how much is lost.",
            ),
        )
    },
)


def convert(
    source: o.ConvertSource,
    output_dir: o.ConvertOutput,
    format: o.ConvertFormat,
    requantize: o.Requantize = False,
    scheme: o.ConvertScheme = None,
    max_shard_size: o.MaxShardSize = None,
    overwrite: o.Overwrite = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
) -> None:
    """Convert one model."""
    with exit_codes():
        from auto_round.conversion import convert as run  # imports torch, which --help has no need of

        quiet_transformers()
        listener = LiveListener(quiet=bool(quiet))
        done = run(
            source,
            output_dir,
            format,
            requantize=requantize,
            scheme=scheme,
            max_shard_size=max_shard_size,
            overwrite=bool(overwrite),
            tell=listener.note,
        )
    if json:
        typer.echo(json_module.dumps({**asdict(done), "error": done.error}, indent=2))
        return
    typer.echo(done.folder if quiet else _sentence(done.folder, done.layers, len(done.losses), done.error))
    for loss in () if quiet else sorted(done.losses, key=lambda loss: -loss.error)[:SHOWN]:
        typer.echo(f"  {loss.layer}: {loss.before} to {loss.after}, {loss.error:.2%} off")


SHOWN = 5


def _sentence(folder: str, layers: int, rounded: int, error: float) -> str:
    if not rounded:
        return f"{folder}: {layers} layers, converted exactly"
    return (
        f"{folder}: {layers} layers, {rounded} of them rounded again, {error:.2%} off (root mean square of all layers' "
        "|W' - W| / |W|); the most:"
    )
