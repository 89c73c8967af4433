"""Error-compensated rounding: GPTQ (arXiv 2210.17323) with fixed groups and columns taken in order of importance.

GPTQ takes every column once, the last ones with nothing left to make up for them. So its codes are improved by
coordinate descent (QuantEase, arXiv 2309.01885): every column again takes the code that is best beside all the others'
codes. Neither raises the output error (W - W') H (W - W')^T, with H the damped second moment of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError

DAMPING = 1e-3  # GPTQ's is 0.01: where one input is massive, that is more than all the others have
SILENT = 1e-20  # a mean diagonal below it counts as this: all inputs may be 0
COLUMNS = 128  # columns between two updates of the rest of the matrix
SWEEPS = 2  # of coordinate descent: a third still gains a percent of the error
ROWS = 1024  # rows of a moment that are put in order at a time, so that the copy needs no third matrix


@dataclass(frozen=True)
class Compensation:
    """What error compensation needs of the inputs that some layers share.

    order: (in,) int64, columns by falling importance. factor: (in, in) float32; on and above the diagonal the upper
    Cholesky factor of the inverse of the damped second moment, its rows and columns in that order, and below it that
    moment itself. diagonal: (in,) float32, the moment's.
    """

    order: Tensor
    factor: Tensor
    diagonal: Tensor


def compensation(moment: Tensor, shrinkage: float) -> Compensation:
    """Prepare compensation from a second moment (in, in) float32, sum or mean of x x^T.

    shrinkage: share of its own diagonal added to it, beside a thousandth of the mean one for silent inputs. The factor
    is all the memory this takes. Raises AutoRoundError when no more of the mean, up to the whole, makes it positive
    definite (activations are not finite).
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    factor = torch.empty_like(moment).mT  # columns contiguous, as LAPACK wants: every step below is then in place
    damping = DAMPING
    while damping <= 1:
        for begin in range(0, len(order), ROWS):
            factor[begin : begin + ROWS] = moment[order[begin : begin + ROWS]][:, order]
        diagonal = factor.diagonal()
        mean = diagonal.mean().clamp_min(SILENT)
        diagonal.mul_(1 + shrinkage).add_(mean * damping)
        damped = diagonal.clone()
        if _inverse_factor(factor):
            for begin in range(0, len(order), ROWS):
                end = begin + ROWS
                rows = moment[order[begin:end]][:, order[:end]]
                factor[begin:end, :begin] = rows[:, :begin]
                factor[begin:end, begin:end].triu_().add_(rows[:, begin:].tril_(-1))
            return Compensation(order, factor, damped)
        damping *= 10
    raise AutoRoundError("the inputs' second moment is not finite; the calibration activations hold NaN or infinity")


def _inverse_factor(matrix: Tensor) -> bool:
    """Put the upper Cholesky factor of its inverse in the place of `matrix`; False when it is not positive definite."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if info:
        return False
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, info))
    return not info


@dataclass(frozen=True)
class Run:
    """Columns that are taken in turn, in their order, n of them and at most COLUMNS.

    lower: (n, n) float32; below the diagonal, what a column's move adds to each later one. diagonal: (n,)
    float32, what a column's own move is measured by. group: (n,) int64, the row of `scale` and `zero`, (groups, out)
    float32, that each column has.
    """

    lower: Tensor
    diagonal: Tensor
    group: Tensor
    scale: Tensor
    zero: Tensor
    max_code: int


def round_run(values: Tensor, run: Run) -> Tensor:
    """Round the columns of a run, each with what the errors of those before it add; return the errors (n, out).

    values: (n, out) float32, a row for each column, replaced by its codes. An error is over the run's diagonal.
    """
    moves = torch.empty_like(values)
    steps, shifts = run.scale[run.group], run.zero[run.group]
    for j, (column, step, shift) in enumerate(zip(values, steps, shifts, strict=True)):
        code = (column / step).round_().add_(shift).clamp_(0, run.max_code)
        torch.sub(code, shift, out=moves[j]).mul_(step).sub_(column).div_(run.diagonal[j])
        values[j + 1 :].addr_(run.lower[j + 1 :, j], moves[j])
        values[j] = code
    return moves


def descend_run(pull: Tensor, codes: Tensor, run: Run) -> Tensor:
    """Give the columns of a run better codes, in place; return the changes of their weights (n, out).

    pull: (n, out) float32, the missing weights times the moment; used up. codes: (n, out) float32.
    """
    steps = run.scale[run.group]
    slopes, moves = steps * run.diagonal[:, None], torch.empty_like(codes)
    for j in range(len(codes)):
        better = (pull[j] / slopes[j]).add_(codes[j]).round_().clamp_(0, run.max_code)
        torch.sub(better, codes[j], out=moves[j]).mul_(steps[j])
        codes[j] = better
        pull[j + 1 :].addr_(run.lower[j + 1 :, j], moves[j])
    return moves


def compensated_codes(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    width: int,
    max_code: int,
    known: Compensation,
    round_run: Callable[[Tensor, Run], Tensor] = round_run,
) -> Tensor:
    """Round column by column, moving each column's error into the columns that are still to come.

    weight: (out, in) float32. scale, zero: (out, groups) float32, each for `width` inputs, the last for what is left.
    round_run: what rounds a run. Returns codes (out, in) float32 in 0 .. max_code.
    """
    order, factor = known.order, known.factor
    # Columns as rows: each is then contiguous, and the inner loop runs over whole cache lines.
    rest = weight.t()[order]
    scales, zeros, group = scale.t().contiguous(), zero.t().contiguous(), order // width
    for begin in range(0, len(order), COLUMNS):
        part = slice(begin, begin + COLUMNS)
        corner, later = factor[part, part], slice(begin + COLUMNS, None)
        run = Run(corner.t(), corner.diagonal(), group[part], scales, zeros, max_code)
        rest[later].addmm_(factor[part, later].t(), round_run(rest[part], run))
    codes = torch.empty_like(weight)
    codes.t()[order] = rest
    return codes


def descended(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    width: int,
    max_code: int,
    known: Compensation,
    descend_run: Callable[[Tensor, Tensor, Run], Tensor] = descend_run,
) -> Tensor:
    """Codes with a smaller error, by `SWEEPS` passes of coordinate descent over the columns.

    As `compensated_codes`; codes (out, in) float32 is where to begin, and what is returned in its place.
    """
    order, matrix = known.order, known.factor
    group = order // width
    scales, zeros = scale.t().contiguous(), zero.t().contiguous()
    level = codes.t()[order]  # columns as rows, as above
    missing = zeros[group].sub_(level).mul_(scales[group]).add_(weight.t()[order])
    for _ in range(SWEEPS):
        pull = _times_moment(known, missing)
        for begin in range(0, len(order), COLUMNS):
            part, later = slice(begin, begin + COLUMNS), slice(begin + COLUMNS, None)
            run = Run(-matrix[part, part], known.diagonal[part], group[part], scales, zeros, max_code)
            moves = descend_run(pull[part], level[part], run)
            pull[later].addmm_(matrix[later, part], moves, alpha=-1)
            missing[part].sub_(moves)
    codes.t()[order] = level
    return codes


def _times_moment(known: Compensation, columns: Tensor) -> Tensor:
    """The damped second moment, of which `factor` holds what is below the diagonal, times columns (in, out)."""
    product = columns * known.diagonal[:, None]
    for begin in range(0, len(columns), ROWS):
        end = begin + ROWS
        left, corner = known.factor[begin:end, :begin], known.factor[begin:end, begin:end].tril(-1)
        product[begin:end].addmm_(left, columns[:begin]).addmm_(corner + corner.t(), columns[begin:end])
        product[:begin].addmm_(left.t(), columns[begin:end])
    return product


def offsets_for(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, margin: float = 0.1) -> Tensor:
    """The smallest V with which rounding gives `codes`, the value lying `margin` inside the rounding boundary.

    All tensors broadcast to the shape of `weight`; returns float32 of that shape.
    """
    distance = (codes - zero) - weight / scale
    return torch.sign(distance) * (distance.abs() - (0.5 - margin)).clamp_min_(0)
