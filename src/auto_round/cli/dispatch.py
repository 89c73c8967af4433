"""From the words of a command line to the command that takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from auto_round.cli.convert import CONVERT_LESSON, convert
from auto_round.cli.demo import DEMO_LESSON, demo
from auto_round.cli.inspect import INSPECT_LESSON, inspect
from auto_round.cli.quantise import lesson_for, quantise
from auto_round.cli.running import BACKENDS_LESSON, CHAT_LESSON, GENERATE_LESSON, backends, chat, generate
from auto_round.cli.teach import Invocation, Lesson, TeachingCommand

# Names that users of other tools type, and ours.
ALIASES = {
    "model_name": "model",
    "model_name_or_path": "model",
    "bs": "batch_size",
    "device_map": "device",
    "formats": "format",
    "fp_layers": "ignore_layers",
}


@dataclass(frozen=True)
class Subcommand:
    """A command behind a word: auto-round WORD."""

    function: Callable[..., None]
    lesson: Lesson


# One row a command. Whatever does not begin with one of these words goes to `quantise`.
SUBCOMMANDS = {
    "convert": Subcommand(convert, CONVERT_LESSON),
    "inspect": Subcommand(inspect, INSPECT_LESSON),
    "demo": Subcommand(demo, DEMO_LESSON),
    "generate": Subcommand(generate, GENERATE_LESSON),
    "chat": Subcommand(chat, CHAT_LESSON),
    "backends": Subcommand(backends, BACKENDS_LESSON),
}

# Words that stand for a flag of `quantise`, and what they do.
WORDS = {"plan": ("--dry_run", "Foresees what the same command without this word would do, and writes nothing.")}


def normalise(flag: str) -> str:
    """Return the one spelling under which a flag is known: underscores for dashes, our name for an alias."""
    plain = flag.replace("-", "_")
    return ALIASES.get(plain, plain)


def command(function: Callable[..., None]) -> Any:
    """Make a command of a function whose parameters are annotated with options."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    settings = {"token_normalize_func": normalise, "help_option_names": ["--help", "-h"]}
    app.command(cls=TeachingCommand, context_settings=settings)(function)
    return typer.main.get_command(app)


def dispatch(program: str, recipe: str, words: Sequence[str]) -> None:
    """Run the command that `words` ask for and exit: 0 done, 2 it cannot be done, 130 interrupted."""
    if words and words[0] in WORDS:
        words = [WORDS[words[0]][0], *words[1:]]
    subcommand = SUBCOMMANDS.get(words[0]) if words and recipe == "default" else None
    if subcommand is None:
        summaries = {f"{program} {word} MODEL": summary for word, (_, summary) in WORDS.items()}
        summaries |= {f"auto-round {word}": entry.lesson.summary for word, entry in SUBCOMMANDS.items()}
        function, lesson = quantise, lesson_for(recipe, summaries)
    else:
        function, lesson = subcommand.function, subcommand.lesson
        program, words = f"{program} {words[0]}", words[1:]
    command(function).main(list(words), prog_name=program, obj=Invocation(recipe, lesson))
