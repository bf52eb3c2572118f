"""The base of the norms that divide by statistics of the batch: ``ExactNorm``."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import functional
from .base import RunningNorm
from .recomputation import inside_backward


class ExactNorm(RunningNorm):
    """Base of the norms whose training divides by statistics of the batch and whose gradient is that of the function."""

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        mean, moment, spec = self._batch_arguments()
        if special:
            y, tally = functional.batch_norm_formula(x, self.weight, self.bias, valid, mean, moment, spec)
            if torch.compiler.is_compiling():
                self._take("forward", tally)
            elif not inside_backward():
                with torch._C._DisableFuncTorch():
                    self._take("forward", functional.unwrapped(tally))
            return y
        recomputed = inside_backward()

        def collect(part: str, tally: Tensor) -> None:
            if part == "forward":
                if not recomputed:
                    self._take(part, tally)
            elif self.stage is not None:
                # the backward pass of these norms changes no statistics, it is only recorded
                self.stage.switches.check_open("backward")
                if self.stage.switches.recording:
                    tally[:-2] /= self.stage.switches.gradient_scale
                    with self._lock:
                        self._take(part, tally)

        with self._lock:
            return functional.batch_norm(
                x, self.weight, self.bias, valid, mean, moment, spec, collect, self._reduce
            )

    def _batch_arguments(self) -> Tuple[Optional[Tensor], Tensor, functional.BatchSpec]:
        """Running mean (or None) and second moment, which stand in for a batch without rows, and the constants."""
        raise NotImplementedError
