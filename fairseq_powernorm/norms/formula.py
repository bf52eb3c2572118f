"""The base of the norms whose training is written in differentiable operations of torch: ``FormulaNorm``."""
from contextlib import nullcontext
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from .. import functional, operators
from ..kernels import eager
from .base import RunningNorm, State
from .distances import discrepancy, size_of
from .recomputation import Recomputations, inside_backward, recomputable
from .staging import Sums


class FormulaNorm(RunningNorm):
    """Base of norms that see mean and variance of the batch and the running statistics, in evaluation only the latter.

    A subclass says in ``_normalized`` what it computes; torch differentiates it. The running statistics in it are those
    before the step; where the norm applies them itself and the pass is repeated (activation checkpointing), it sees what it
    saw at first. With ``sync="exact"`` mean and variance, and their gradients, are those of all processes.

    In evaluation all of them are affine: ``(u - mean) * inverse``, then weight and bias.
    """

    SUMS = {"forward": ("u", "u^2"), "backward": ("dz", "dz * z")}
    MEAN: Optional[str] = "running_mean"
    MOMENT = "running_var"

    def __init__(self, dim: int, **options: Any):
        super().__init__(dim, **options)
        self._recomputations = Recomputations()

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "_recomputations": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recomputations = Recomputations()

    @classmethod
    def default_groups(cls, heads: int, **options: object) -> int:
        """None in any model: these norms were published without layer scale."""
        return 0

    # ------------------------------------------------------------------ evaluation

    def _divisor(self) -> Tuple[Tensor, float]:
        """psi^2 and eps: evaluation divides by ``sqrt(psi^2 + eps)``."""
        moment = self._buffers[self.MOMENT]
        if self.ROOT == "clamped":
            return moment.clamp(min=self.eps), 0.0
        return (moment.square(), 0.0) if self.ROOT == "deviation" else (moment, self.eps)

    def _evaluate(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        psi2, eps = self._divisor()
        mean = None if self.MEAN is None else self._buffers[self.MEAN]
        return functional.running_norm(x, *self._affine(), psi2, self.groups, eps, mean)

    def inverse(self, moment: Tensor) -> Tensor:
        """What evaluation multiplies by, from a value of the buffer ``MOMENT``."""
        if self.ROOT == "deviation":
            return 1.0 / moment
        return torch.rsqrt(moment.clamp(min=self.eps) if self.ROOT == "clamped" else moment + self.eps)

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        moment = self._buffers[self.MOMENT].detach()
        scale = self.inverse(moment.to(eager.sum_dtype(moment)))
        shift = torch.zeros_like(scale)
        if self.weight is not None:
            scale = scale * self.weight.detach()
        if self.bias is not None:
            shift = shift + self.bias.detach()
        return scale, shift if self.MEAN is None else shift - scale * self._buffers[self.MEAN].detach()

    # ------------------------------------------------------------------ training

    @property
    def _batch_alone(self) -> bool:
        """Divide by statistics of the batch only, whatever the running ones are: they are being estimated anew."""
        return self.stage is not None and self.stage.switches.batch_statistics

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        if torch.compiler.is_compiling():
            tally, moments = self._measure(x, valid)
            state = {name: operators.snapshot(buffer) for name, buffer in self.statistics().items()}
            y = self._output(x, valid, moments, state, recomputed=False)
            self._take("forward", tally)
            return y
        with self._lock:
            recomputed = inside_backward()
            tally, moments = self._measure(x, valid)
            tally = functional.unwrapped(tally)
            y = self._output(x, valid, moments, self._seen(tally, recomputed=recomputed), recomputed=recomputed)
            if not recomputed:
                with torch._C._DisableFuncTorch() if special else nullcontext():
                    self._take("forward", tally)
            return y

    def _measure(self, x: Tensor, valid: Optional[Tensor]) -> Tuple[Tensor, Any]:
        """The tally of a pass, without gradient, and what ``_output`` takes besides."""
        moments = functional.batch_moments(x, valid, self.groups, self._reduce)
        return moments.tally, moments

    def _output(
        self, x: Tensor, valid: Optional[Tensor], moments: Any, state: State, *, recomputed: bool
    ) -> Tensor:
        """The output of a pass, see ``_normalized``."""
        y = self._normalized(moments, state, recomputed=recomputed)
        return functional.output_like(y, x, moments.valid)

    def _seen(self, tally: Tensor, *, recomputed: bool) -> State:
        """The running statistics that a pass with this tally sees: those before its step."""
        state = {name: self.statistic(name) for name in self.statistics()}
        if self.stage is not None:
            return state
        with operators.outside_of_modes(), torch._C._DisableFuncTorch():
            if recomputed and self._recomputations:
                known = self._recomputations.recall(tally).state.split([each.numel() for each in state.values()])
                return {name: part.view_as(state[name]).to(state[name].dtype) for name, part in zip(state, known)}
            if not recomputed and recomputable():
                self._recomputations.remember(torch.cat([each.reshape(-1) for each in state.values()]), None, tally)
        return state

    def _normalized(self, moments: functional.Moments, state: State, *, recomputed: bool) -> Tensor:
        """The output for the rows ``moments.u``, in their precision.

        Args:
            moments: of the batch
            state: the running statistics before the step, in their own precision; they are about to change in place
            recomputed: the pass has been made before
        """
        raise NotImplementedError

    def _with_affine(self, z: Tensor) -> Tensor:
        """``weight * z + bias``"""
        weight, bias = self._affine()
        z = z if weight is None else z * weight.to(z.dtype)
        return z if bias is None else z + bias.to(z.dtype)

    def _watched(self, z: Tensor, moments: functional.Moments) -> Tensor:
        """``z``, whose gradient a stage records when it arrives."""
        stage = self.stage
        if stage is None or torch.compiler.is_compiling() or not z.requires_grad or functional.in_transform():
            return z
        rows, own = z.detach(), moments.own.detach()

        def record(grad: Tensor) -> None:
            stage.switches.check_open("backward")
            if stage.switches.recording:
                grad = grad.detach()
                tally = eager.tally(functional.sum_rows(grad), functional.sum_rows(grad * rows), rows=own)
                tally[:-2] /= stage.switches.gradient_scale
                with self._lock:
                    self._take("backward", tally)

        z.register_hook(record)
        return z

    # ------------------------------------------------------------------ statistics

    def _moved(self, state: State, sums: Sums, alpha_fwd: float, batch: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """The running statistics after a step: exponential averages; unchanged where no row counts or not finite."""
        new = {"iters": state["iters"] + 1}
        for name, value in batch.items():
            old = state[name]
            new[name] = torch.where(
                sums.rows > 0, eager.finite_or(alpha_fwd * old + (1.0 - alpha_fwd) * value, old), old
            )
        return new

    @staticmethod
    def _mean_and_var(sums: Sums) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance from the sums of u and u^2."""
        mean, square = sums.means()
        return mean, (square - mean.square()).clamp(min=0)

    def _describe(
        self, state: State, running_var: Tensor, forward: Sums, backward: Sums, inv2: Tensor, through_var: Tensor
    ) -> Dict[str, Tensor]:
        """See ``describe``.

        Args:
            running_var: variance that evaluation divides by
            inv2: square of what a pass multiplies by, 1 / variance
            through_var: mean square over rows of the derivative of a row's ``z`` through the variance, where z^2 has mean 1
        """
        (mean, var), (grad, grad_z) = self._mean_and_var(forward), backward.means()
        return {
            "distance_mean": size_of(mean - state["running_mean"]),
            "distance_var": size_of(var - running_var),
            "size_mean": size_of(state["running_mean"]),
            "size_var": size_of(running_var),
            "gradient_mean": (grad.square() * inv2).sum(-1).sqrt(),
            "gradient_var": (grad_z.square() * through_var).sum(-1).sqrt(),
            **discrepancy(inv2.rsqrt(), 1.0 / self.inverse(state[self.MOMENT]), mean, state["running_mean"]),
        }
