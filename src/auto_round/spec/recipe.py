"""How hard to try: everything that decides the result besides the scheme."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from auto_round.errors import SpecError

STARTS = ("plain", "search", "compensated")
LONGEST = 1 / 25  # a first step of V beyond it moves too many codes for nothing, however few steps there are


@dataclass(frozen=True)
class Recipe:
    """Tuning settings.

    iters: steps per block; 0 is round-to-nearest from `start`, without steps.
    lr: how far the rounding offset V goes in a step at most, in code units; falls linearly to 0. None is 1 / iters, and
        2 / iters in layers of 2 bits, where rounding has more to gain; never above 1 / 25, beyond which steps go too
        far (docs/ablations.md).
    minmax_lr: step size of the range multipliers alpha and beta; None is a tenth of lr, since a searched range is
        near its best already; a quarter of lr in layers of 2 bits.
    nsamples, seqlen: calibration samples and tokens in each.
    self_nsamples: samples on top of those that the model writes itself, each going on from a piece of one of them; for
        when there is little text (docs/ablations.md).
    batch_size: samples per forward; times gradient_accumulate_steps = samples per step.
    seed: draws the calibration samples and, with the block's index, each block's batches.
    enable_minmax_tuning: tune the ranges as well as the rounding.
    enable_quanted_input: feed a block what the quantised blocks before it give (else the original's activations).
    low_gpu_mem_usage: keep activations on the host and move them batch by batch.
    enable_torch_compile: compile the block's forward.
    start: "plain" (max range), "search" (range search weighted by the inputs' second moment) or
        "compensated" (search, then error-compensated rounding in GPTQ order, arXiv 2210.17323).
    heldout: share of the samples kept out of the steps, on which the best iterate is chosen.
    finish_iters: steps after all blocks in which the scales of all layers learn together, by the KL divergence of the
        model's tokens from the original's; 0 for none. finish_lr: size of the first, a share of each scale; it falls
        linearly to 0; None is 2^-(6 + bits), so that the largest code moves as far at every width. finish_nsamples:
        samples for it, the first `nsamples` being the blocks'; None for those alone.
    """

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    nsamples: int = 128
    self_nsamples: int = 0
    seqlen: int = 2048
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    seed: int = 42
    enable_minmax_tuning: bool = True
    enable_quanted_input: bool = True
    low_gpu_mem_usage: bool = False
    enable_torch_compile: bool = False
    start: str = "compensated"
    heldout: float = 0.0625
    finish_iters: int = 0
    finish_lr: float | None = None
    finish_nsamples: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("iters", 0),
            ("nsamples", 1),
            ("self_nsamples", 0),
            ("seqlen", 1),
            ("batch_size", 1),
            ("gradient_accumulate_steps", 1),
            ("seed", 0),
            ("finish_iters", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpecError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.finish_nsamples is not None and self.finish_nsamples < self.nsamples:
            raise SpecError(f"finish_nsamples={self.finish_nsamples} is below nsamples={self.nsamples}")
        for name in ("lr", "minmax_lr", "finish_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise SpecError(f"{name}={value!r} must lie in (0, 1]; it is a step in units of a code")
        if self.start not in STARTS:
            raise SpecError(f"start={self.start!r} is not known; use one of {', '.join(STARTS)}")
        if not 0 <= self.heldout <= 0.5:
            raise SpecError(f"heldout={self.heldout!r} must lie between 0 and 0.5")

    def per_step(self, count: int) -> int:
        """Samples in one step, of `count` that there are."""
        return min(self.batch_size * self.gradient_accumulate_steps, count)

    def v_lr(self, bits: int) -> float:
        """Step size of V at the first step, in layers of so many bits."""
        return self.lr if self.lr is not None else min((2.0 if bits == 2 else 1.0) / max(self.iters, 1), LONGEST)

    def range_lr(self, bits: int) -> float:
        """Step size of alpha and beta at the first step, in layers of so many bits; 0 where ranges stay."""
        if not self.enable_minmax_tuning:
            return 0.0
        return self.minmax_lr if self.minmax_lr is not None else self.v_lr(bits) / (4 if bits == 2 else 10)

    def by_tokens(self, bits: int) -> bool:
        """True when a last block with layers of so many bits is tuned by the KL divergence of the model's tokens.

        Beyond 2 bits it wins nothing, and a head can cost more than all steps of its block (docs/ablations.md).
        """
        return self.iters > 0 and bits == 2

    def scale_lr(self, bits: int) -> float:
        """Size of the first finishing step in layers of so many bits, a share of each scale."""
        return self.finish_lr if self.finish_lr is not None else 2.0 ** -(6 + bits)

    @property
    def calibrated(self) -> bool:
        """True when calibration text is needed: plain rounding to nearest looks at no activations."""
        return bool(self.iters or self.finish_iters) or self.start != "plain"

    @property
    def given_samples(self) -> int:
        """How many samples of the user's text the whole run takes."""
        return self.finish_nsamples if self.finish_iters and self.finish_nsamples else self.nsamples

    @property
    def block_samples(self) -> int:
        """How many samples the blocks are tuned on: the first of all."""
        return self.nsamples + self.self_nsamples

    @property
    def samples(self) -> int:
        """How many samples there are in all."""
        return self.given_samples + self.self_nsamples

    def updated(self, **values: object) -> Recipe:
        """Return a copy with the given fields replaced; None keeps the field."""
        return dataclasses.replace(self, **{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]
