"""Steps of the running statistics in plain torch, of one norm or of many at once: part of the ``eager`` backend."""
import math
from typing import Optional

import torch
from torch import Tensor

from .interface import StepSpec


def next_psi2(
    psi2: Tensor, iters: Tensor, batch: Tensor, rows: Tensor, step: StepSpec, *, alpha_fwd: Optional[float] = None
) -> Tensor:
    """psi^2 after one step; pure, any leading dimensions.

    Args:
        psi2: ``... x C``
        iters: ``... x 1``, steps taken before this one
        batch: ``... x C``, the step's second moment
        rows: ``... x 1``, number of rows it was taken over; without any, psi^2 stays as it is
        step: constants
        alpha_fwd: in place of ``step.alpha_fwd``, for instance 0 to replace psi^2 by the batch's
    """
    alpha = step.alpha_fwd if alpha_fwd is None else alpha_fwd
    number = iters + 1
    if step.jump < math.inf and alpha > 0.0:
        batch = torch.where(number > step.trusted_after, torch.minimum(batch, step.jump * (psi2 + step.eps)), batch)
    new = psi2
    if step.warmup > 0:
        new = torch.where(number < step.warmup, psi2 * (number - 1) / number + batch / number, psi2)
    new = alpha * new + (1.0 - alpha) * batch
    return torch.where(rows > 0, finite_or(new, psi2), psi2)


def next_nu(nu: Tensor, grad_z: Tensor, z_square: Tensor, rows: Tensor, step: StepSpec) -> Tensor:
    """nu after one step; pure, any leading dimensions.

    Args:
        nu: ``... x C``
        grad_z, z_square: ``... x C``, means of ``weight * dy * z`` and of z^2 over the step's rows
        rows: ``... x 1``, their number; without any, nu stays as it is
        step: constants
    """
    kept = 1.0 - step.nu_scale * z_square
    if step.nu_lowest > -math.inf:
        kept = kept.clamp(min=step.nu_lowest)
    return torch.where(rows > 0, finite_or(nu * kept + grad_z, nu), nu)


def finite_or(new: Tensor, old: Tensor) -> Tensor:
    """``new`` if all of its C channels are finite, else ``old``: one bad batch never enters a buffer."""
    return torch.where(torch.isfinite(new).all(-1, keepdim=True), new, old)


def _matrix(vectors: Tensor, tally: Tensor) -> Tensor:
    """Statistics of n norms, ``n x C`` (``n x 1``), in the precision of their sums."""
    return vectors.reshape(-1, vectors.numel() // tally.view(-1, tally.size(-1)).size(0)).to(tally.dtype)


def _put(vectors: Tensor, new: Tensor, taken: Tensor) -> None:
    """Write what is ``taken`` and, in the precision of the statistics, finite."""
    old = vectors.reshape(new.shape)
    vectors.copy_(torch.where(taken, finite_or(new.to(old.dtype), old), old).view(vectors.shape))


@torch.no_grad()
def advance_forward(tally: Tensor, psi2: Tensor, iters: Tensor, step: StepSpec) -> None:
    """One step of psi^2 and of the step count of n norms, in place.

    Args:
        tally: ``n x (C + 2)``: sums of u^2, rows, calls; a norm without a call takes no step
        psi2: ``n x C``
        iters: ``n``
        step: constants
    """
    tally = tally.view(-1, tally.size(-1))
    rows, calls = tally[:, -2:-1], tally[:, -1:]
    batch = tally[:, :-2] / rows.clamp(min=1)
    count = _matrix(iters, tally)
    _put(psi2, next_psi2(_matrix(psi2, tally), count, batch, rows, step), calls > 0)
    _put(iters, count + 1, calls > 0)


@torch.no_grad()
def advance_backward(tally: Tensor, nu: Tensor, step: StepSpec) -> None:
    """One step of nu of n norms, in place.

    Args:
        tally: ``n x (2 C + 2)``: sums of ``weight * dy * z`` and of z^2, rows, calls; a norm without a call takes no step
        nu: ``n x C``
        step: constants
    """
    tally = tally.view(-1, tally.size(-1))
    rows, calls = tally[:, -2:-1], tally[:, -1:]
    grad_z, z_square = (tally[:, :-2] / rows.clamp(min=1)).chunk(2, dim=1)
    _put(nu, next_nu(_matrix(nu, tally), grad_z, z_square, rows, step), calls > 0)
