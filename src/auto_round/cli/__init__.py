"""The command line: it reads flags, calls the API and shows the result. It holds no defaults and no logic."""

from __future__ import annotations

import sys

from auto_round.cli.dispatch import dispatch


def main() -> None:
    """Run ``auto-round``, which is also ``python -m auto_round``."""
    dispatch("auto-round", "default", sys.argv[1:])


def main_best() -> None:
    """Run ``auto-round-best``: ``auto-round`` with the recipe "best"."""
    dispatch("auto-round-best", "best", sys.argv[1:])


def main_light() -> None:
    """Run ``auto-round-light``: ``auto-round`` with the recipe "light"."""
    dispatch("auto-round-light", "light", sys.argv[1:])


def main_rtn() -> None:
    """Run ``auto-round-rtn``: ``auto-round`` with the recipe "rtn"."""
    dispatch("auto-round-rtn", "rtn", sys.argv[1:])
