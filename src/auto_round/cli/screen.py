"""What every command does with errors and with the noise of other libraries."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from auto_round.errors import AutoRoundError, CheckError

CANNOT = 2
UNSOUND = 3
INTERRUPTED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error of ours into a red line and exit code 2 (3 when the result is bad), Ctrl-C or SIGTERM into 130.

    Bugs keep their traceback. SIGTERM is what a batch system or a container's end sends; it stops a run as Ctrl-C does.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except AutoRoundError as error:
        headline, _, details = str(error).partition("\n")
        console = Console(stderr=True)
        console.print(Text(f"error: {headline}", style="bold red"), soft_wrap=True)
        if details:
            console.print(Text(details), soft_wrap=True)
        raise typer.Exit(UNSOUND if isinstance(error, CheckError) else CANNOT) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="bold red")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_transformers() -> None:
    """Keep the loading bars and advice of transformers out of the progress display of this process."""
    from transformers.utils import logging  # slow to import, and not needed for --help

    logging.set_verbosity_error()
    logging.disable_progress_bar()
