"""What every command does with errors and with the noise of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from auto_round.errors import AutoRoundError

CANNOT = 2
INTERRUPTED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error of ours into a red line and exit code 2, Ctrl-C into exit code 130; bugs keep their traceback."""
    try:
        yield
    except AutoRoundError as error:
        headline, _, details = str(error).partition("\n")
        console = Console(stderr=True)
        console.print(Text(f"error: {headline}", style="bold red"), soft_wrap=True)
        if details:
            console.print(Text(details), soft_wrap=True)
        raise typer.Exit(CANNOT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="bold red")
        raise typer.Exit(INTERRUPTED) from None


def quiet_transformers() -> None:
    """Keep the loading bars and advice of transformers out of the progress display of this process."""
    from transformers.utils import logging  # slow to import, and not needed for --help

    logging.set_verbosity_error()
    logging.disable_progress_bar()
