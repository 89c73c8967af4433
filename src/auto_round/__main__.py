"""``python -m auto_round`` is ``auto-round``."""

from auto_round.cli import main

if __name__ == "__main__":
    main()
