"""The border to transformers: what it raises over files that are not what they say becomes one kind of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from huggingface_hub.errors import StrictDataclassError

from auto_round.errors import AutoRoundError, SourceError

# It checks little and fails where the value happens to be used: a missing key, a division by zero, a wrong type.
RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@contextmanager
def foreign(doing: str) -> Iterator[None]:
    """Around calls of transformers on a user's files: raises SourceError that says what was being done, and why not."""
    try:
        yield
    except AutoRoundError:
        raise
    except RAISED as error:
        said = " ".join(str(error).split())[:400] or "no reason given"
        raise SourceError(
            f"{doing}: transformers {transformers.__version__} says {type(error).__name__}: {said}"
        ) from None
