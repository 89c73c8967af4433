"""The road that data takes: open the source, plan, calibrate, walk the blocks, and write formats from the codes."""

from auto_round.pipeline.flow import quantise
from auto_round.pipeline.job import Job, Quantised
from auto_round.pipeline.saving import save

__all__ = ["Job", "Quantised", "quantise", "save"]
