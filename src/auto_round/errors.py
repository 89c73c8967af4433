"""The exception tree. Every error a user can cause derives from ``AutoRoundError``; the command line then exits with 2.

AutoRoundError
├── SpecError         a scheme, recipe, preset or layer rule is not valid
├── SourceError       the model cannot be read: missing, truncated, unsafe or not understood
├── CalibrationError  the calibration set cannot be built
├── FormatError       an output or input format cannot hold or read what is asked
├── BackendError      no inference backend fits, or the one asked for does not
├── OutputError       the output folder is not usable
└── CheckError        the result was written, but is too far from the original; the command line exits with 3
"""


class AutoRoundError(Exception):
    """Base of all errors raised on purpose by this package."""


class SpecError(AutoRoundError, ValueError):
    """A scheme, recipe, preset or layer rule is not valid."""


class SourceError(AutoRoundError):
    """The model cannot be read: missing, truncated, unsafe or not understood."""


class CalibrationError(AutoRoundError):
    """The calibration set cannot be built."""


class FormatError(AutoRoundError):
    """A format cannot hold or read what is asked."""


class BackendError(AutoRoundError):
    """No inference backend fits, or the one asked for does not."""


class OutputError(AutoRoundError):
    """The output folder is not usable."""


class CheckError(AutoRoundError):
    """The result was written, but is too far from the original."""
