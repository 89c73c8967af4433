"""Error-compensated rounding: GPTQ (arXiv 2210.17323) with fixed groups and columns taken in order of importance.

GPTQ takes every column once, the last ones with nothing left to make up for them. So its codes are improved by
coordinate descent (QuantEase, arXiv 2309.01885): every column again takes the code that is best beside all the others'
codes. Neither raises the output error (W - W') H (W - W')^T, with H the damped second moment of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError

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


def compensation(moment: Tensor, damping: float = 0.01) -> Compensation:
    """Prepare compensation from a second moment (in, in) float32, sum or mean of x x^T.

    damping: share of the mean diagonal added to it. The factor is all the memory this takes. Raises AutoRoundError when
    no damping up to the whole diagonal makes it positive definite (activations are not finite).
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    factor = torch.empty_like(moment).mT  # columns contiguous, as LAPACK wants: every step below is then in place
    while damping <= 1:
        for begin in range(0, len(order), ROWS):
            factor[begin : begin + ROWS] = moment[order[begin : begin + ROWS]][:, order]
        diagonal = factor.diagonal()
        diagonal.add_(float(diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny) * damping))
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


def compensated_codes(
    weight: Tensor, scale: Tensor, zero: Tensor, width: int, max_code: int, known: Compensation
) -> Tensor:
    """Round column by column, moving each column's error into the columns that are still to come.

    weight: (out, in) float32. scale, zero: (out, groups) float32, each for `width` inputs, the last for what is left.
    Returns codes (out, in) float32 in 0 .. max_code.
    """
    order, factor = known.order, known.factor
    # Columns as rows: each is then contiguous, and the inner loop runs over whole cache lines.
    rest = weight.t()[order]
    scales, zeros = scale.t().contiguous(), zero.t().contiguous()
    count = rest.shape[0]
    for begin in range(0, count, COLUMNS):
        end = min(begin + COLUMNS, count)
        group = order[begin:end] // width
        steps, shifts = scales[group], zeros[group]
        errors = torch.empty_like(rest[begin:end])
        for j in range(begin, end):
            column, step, shift = rest[j], steps[j - begin], shifts[j - begin]
            code = (column / step).round_().add_(shift).clamp_(0, max_code)
            error = torch.sub(code, shift).mul_(step).sub_(column).div_(factor[j, j])
            rest[j + 1 : end].addr_(factor[j, j + 1 : end], error)
            errors[j - begin] = error
            rest[j] = code  # the column is done: its place holds its codes
        rest[end:].addmm_(factor[begin:end, end:].t(), errors)
    codes = torch.empty_like(weight)
    codes.t()[order] = rest
    return codes


def descended(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, width: int, max_code: int, known: Compensation
) -> Tensor:
    """Codes with a smaller error, by `SWEEPS` passes of coordinate descent over the columns.

    Shapes as in `compensated_codes`; codes (out, in) float32 is where to begin, and what is returned in its place.
    """
    order, matrix = known.order, known.factor
    group = order // width
    scales = scale.t().contiguous()
    level = codes.t()[order]  # columns as rows, as above
    missing = (zero.t()[group].sub_(level)).mul_(scales[group]).add_(weight.t()[order])
    for _ in range(SWEEPS):
        pull = _times_moment(known, missing)
        for begin in range(0, len(order), COLUMNS):
            end = min(begin + COLUMNS, len(order))
            steps = scales[group[begin:end]]
            slopes = steps * known.diagonal[begin:end, None]
            moves = torch.empty_like(steps)
            for j in range(begin, end):
                better = (pull[j] / slopes[j - begin]).add_(level[j]).round_().clamp_(0, max_code)
                torch.sub(better, level[j], out=moves[j - begin])
                moves[j - begin].mul_(steps[j - begin])
                level[j] = better
                pull[j + 1 : end].addr_(matrix[j + 1 : end, j], moves[j - begin], alpha=-1)
            pull[end:].addmm_(matrix[end:, begin:end], moves, alpha=-1)
            missing[begin:end].sub_(moves)
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
