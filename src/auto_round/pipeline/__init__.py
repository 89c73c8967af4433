"""The road that data takes: open the source, plan, calibrate, walk the blocks, and write formats from the codes."""

from auto_round.pipeline.flow import foresee, make_ready, quantise, run
from auto_round.pipeline.job import Job, Quantised, Ready, Saving
from auto_round.pipeline.planning import check_formats
from auto_round.pipeline.publishing import publish, was_published

__all__ = [
    "Job",
    "Quantised",
    "Ready",
    "Saving",
    "check_formats",
    "foresee",
    "make_ready",
    "publish",
    "quantise",
    "run",
    "was_published",
]
