"""The base of the norms that divide by statistics of the batch: ``ExactNorm``."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import functional
from ..kernels import memory
from .base import RunningNorm
from .recomputation import inside_backward


class ExactNorm(RunningNorm):
    """Base of the norms whose training divides by statistics of the batch and whose gradient is that of the function."""

    OWN_LAYOUT = True

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        if special:
            mean, moment, spec = self._batch_arguments()
            y, tally = functional.batch_norm_formula(x, self.weight, self.bias, valid, mean, moment, spec)
            if torch.compiler.is_compiling():
                self._take("forward", tally)
            elif not inside_backward():
                with torch._C._DisableFuncTorch():
                    self._take("forward", functional.unwrapped(tally))
            return memory.view_channels_second(y, x) if self._channels_second(x) else y
        recomputed = inside_backward()
        with self._lock:
            if (y_ := self._train_natively(x, valid, recomputed=recomputed)) is not None:
                return y_

            def collect(part: str, tally: Tensor) -> None:
                if part == "backward":
                    self._record(part, tally)
                elif not recomputed:
                    self._take(part, tally)

            mean, moment, spec = self._batch_arguments()
            step = self._own_step() if self.stage is None and not recomputed else None
            return functional.batch_norm(
                x, *self._affine(), valid, mean, moment, spec, collect, self._reduce, step,
                channels_second=self._channels_second(x),
            )  # fmt: skip

    def _train_natively(self, x: Tensor, valid: Optional[Tensor], *, recomputed: bool) -> Optional[Tensor]:
        """An ordinary pass by the autograd function in C++; None, with nothing done, where that does not serve."""
        stage, alpha, sums = self.stage, None, functional.NO_STAGE
        if stage is None:
            if not recomputed:
                if not self._takes_known_step():
                    return None
                alpha = self.alpha_fwd
        elif stage.switches.reduce is not None:
            return None
        else:
            forward = stage.parts["forward"] if stage.switches.counting and not recomputed else None
            sums = functional.StageSums(forward, None, stage.switches)
        spec = self._constants.get("batch")
        if spec is None:
            spec = self._constants["batch"] = self._batch_arguments()[2]
        buffers = self._buffers
        mean = None if self.MEAN is None else buffers[self.MEAN]
        return functional.native_batch_norm(
            x, *self._affine(), valid, mean, buffers[self.MOMENT], buffers["iters"], spec, self._record, alpha, sums,
            channels_second=self._channels_second(x),
        )  # fmt: skip

    def _record(self, part: str, tally: Tensor) -> None:
        """Take in the sums of a backward pass, which changes no statistics of these norms: a stage may record them."""
        if self.stage is None:
            return
        self.stage.switches.check_open("backward")
        if self.stage.switches.recording:
            tally[:-2] /= self.stage.switches.gradient_scale
            with self._lock:
                self._take(part, tally)

    def _takes_known_step(self) -> bool:
        """Is the step of the running statistics that which kernels know, and not the rule of a derived class?"""
        raise NotImplementedError

    def _own_step(self) -> Optional[functional.BatchStep]:
        """The step that a backend may take instead of the norm."""
        if not self._takes_known_step():
            return None
        mean = None if self.MEAN is None else self.statistic(self.MEAN)
        return functional.BatchStep(mean, self.statistic(self.MOMENT), self.statistic("iters"), self.alpha_fwd)

    def _batch_arguments(self) -> Tuple[Optional[Tensor], Tensor, functional.BatchSpec]:
        """Running mean (or None) and second moment, which stand in for a batch without rows, and the constants."""
        raise NotImplementedError
