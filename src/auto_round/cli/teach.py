"""``--help`` that teaches: flags in groups with a sentence each, then what to type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from auto_round.spec.recipe import Recipe

WIDEST = 110
LEFT_COLUMN = 31


@dataclass(frozen=True)
class Lesson:
    """The help of one command besides its flags.

    usage: what follows the command's name. summary: a paragraph. defaults: what ``{name}`` in a flag's sentence
    becomes. sections: heading -> rows of (what to type, what it does).
    """

    usage: str
    summary: str
    defaults: Mapping[str, str]
    sections: Mapping[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Invocation:
    """What a command knows besides its flags: the recipe of the entry point, and its lesson."""

    recipe: str
    lesson: Lesson


def in_words(recipe: Recipe) -> dict[str, str]:
    """The fields of a recipe as a reader would say them."""
    stand_ins = {
        "lr": "1 / iters, 2 / iters at 2 bits",
        "minmax_lr": "a tenth of --lr, a quarter of --lr at 2 bits",
        "finish_lr": "0.0039 at 2 bits, half of it for each bit more",
        "finish_nsamples": "as --nsamples",
    }
    words = {}
    for name, value in asdict(recipe).items():
        switch = "on" if value else "off"
        words[name] = stand_ins[name] if value is None else switch if isinstance(value, bool) else f"{value}"
    return words


class TeachingCommand(TyperCommand):
    """A command whose help is laid out for 80 columns: typer's own has a column for every kind of spelling."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; `formatter` stays empty."""
        lesson: Lesson = ctx.obj.lesson
        console = Console(highlight=False)
        console.width = min(console.width, WIDEST)
        console.print(Text.assemble(("Usage: ", "bold"), f"{ctx.command_path} {lesson.usage}"))
        console.print(Text(f"\n{lesson.summary}"))
        groups: dict[str, list[tuple[str, str]]] = {}
        params: list[Any] = list(self.get_params(ctx))  # typer's options have more than click's parameters
        for param in params:
            if param.param_type_name == "option" and not param.hidden:
                sentence = (param.help or "").format_map(lesson.defaults)
                group = getattr(param, "rich_help_panel", None) or "Other"  # --help is click's own in older typer
                groups.setdefault(group, []).append((_spelling(param), sentence))
        for heading, rows in groups.items():
            _section(console, heading, rows)
        for heading, examples in lesson.sections.items():
            console.print(Text(f"\n{heading}", style="bold"))
            for typed, meaning in examples:
                console.print(Text(f"  {typed}", style="cyan"), soft_wrap=True)
                console.print(Padding(Text(meaning), (0, 0, 0, 6)))


def _section(console: Console, heading: str, rows: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=LEFT_COLUMN, style="cyan", overflow="fold")
    table.add_column()
    for left, right in rows:
        table.add_row(Text(left), Text(right))
    console.print(Text(f"\n{heading}", style="bold"))
    console.print(table)


def _spelling(param: Any) -> str:
    """--flag VALUE, with the word that turns it off on a line of its own."""
    value = f" {param.metavar}" if param.metavar else ""
    return "\n".join([f"  {', '.join(param.opts)}{value}", *(f"  {off}" for off in param.secondary_opts)])
