"""Error-compensated rounding: GPTQ (arXiv 2210.17323) with fixed groups and columns taken in order of importance."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError

COLUMNS = 128  # columns between two updates of the rest of the matrix


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment.

    moment: (in, in) float32, sum or mean of x x^T; damping: share of the mean diagonal added to it. Raises
    AutoRoundError when no damping up to the whole diagonal makes it positive definite (activations are not finite).
    """
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor: Tensor
    while damping <= 1:
        damped = moment + torch.diag(diagonal.new_full((len(diagonal),), float(mean * damping)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
    raise AutoRoundError("the inputs' second moment is not finite; the calibration activations hold NaN or infinity")


def compensated_codes(
    weight: Tensor, scale: Tensor, zero: Tensor, max_code: int, moment: Tensor, damping: float = 0.01
) -> Tensor:
    """Round column by column, moving each column's error into the columns that are still to come.

    weight: (out, in) float32. scale, zero: (out, in) float32, each group's values repeated for its inputs.
    moment: (in, in) float32 second moment of the layer's inputs. Returns codes (out, in) float32 in 0 .. max_code.
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    factor = inverse_factor(moment[order][:, order], damping)
    # Columns as rows: each is then contiguous, and the inner loop runs over whole cache lines.
    rest = weight.t()[order].contiguous()
    scale, zero = scale.t()[order].contiguous(), zero.t()[order].contiguous()
    codes = torch.empty_like(rest)
    count = rest.shape[0]
    for begin in range(0, count, COLUMNS):
        end = min(begin + COLUMNS, count)
        errors = torch.empty_like(rest[begin:end])
        for j in range(begin, end):
            column = rest[j]
            code = (column / scale[j]).round_().add_(zero[j]).clamp_(0, max_code)
            codes[j] = code
            error = code.sub_(zero[j]).mul_(scale[j]).sub_(column).div_(factor[j, j])
            rest[j + 1 : end].addr_(factor[j, j + 1 : end], error)
            errors[j - begin] = error
        rest[end:].addmm_(factor[begin:end, end:].t(), errors)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def offsets_for(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, margin: float = 0.1) -> Tensor:
    """The smallest V with which rounding gives `codes`, the value lying `margin` inside the rounding boundary.

    All tensors broadcast to the shape of `weight`; returns float32 of that shape.
    """
    distance = (codes - zero) - weight / scale
    return torch.sign(distance) * (distance.abs() - (0.5 - margin)).clamp_min_(0)
