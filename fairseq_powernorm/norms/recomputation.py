"""Activation checkpointing with a norm that applies its own statistics: which pass is it that is computed again?

A forward pass that is repeated inside the backward pass must see the running statistics that it saw at first, which have
moved on since. So each pass that may be repeated leaves a record, and the repeated one finds it by the sums of its
input: they depend on nothing else, and are the same again.
"""
from collections import deque
from typing import Deque, List, NamedTuple, Optional

import torch
from torch import Tensor

from ..functional import saved_tensors_are_hooked
from ..kernels.interface import PowerNormSpec

#: passes that are remembered; older ones can't be repeated
MOST = 128
#: largest difference, relative to the largest sum, of the sums of a pass and of its repetition
TOLERANCE = 1e-4


def inside_backward() -> bool:
    """True while an autograd backward pass runs: a forward pass then is a recomputation (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def recomputable() -> bool:
    """May the forward pass in progress be repeated? Checkpointing runs it without gradient or with hooks."""
    return not torch.is_grad_enabled() or saved_tensors_are_hooked()


class Pass(NamedTuple):
    """A forward pass: the running statistics before it (PN: psi^2), PN's constants, its tally."""

    state: Tensor
    spec: Optional[PowerNormSpec]
    tally: Tensor


class Recomputations:
    """The forward passes of one norm that may be repeated."""

    def __init__(self) -> None:
        self._passes: Deque[Pass] = deque(maxlen=MOST)
        self._repeated: List[Pass] = []

    def __len__(self) -> int:
        return len(self._passes)

    def remember(self, state: Tensor, spec: Optional[PowerNormSpec], tally: Tensor) -> None:
        """Keep the record of a pass; those that have been repeated before it are over."""
        for each in self._repeated:
            self._passes = deque((known for known in self._passes if known is not each), MOST)
        self._repeated = []
        self._passes.append(Pass(state, spec, tally))

    def recall(self, tally: Tensor) -> Pass:
        """The record of the pass with this tally.

        Raises:
            RuntimeError: there is none, or there are several that saw different statistics
        """
        passes = [known for known in self._passes if known.tally.device == tally.device]  # replicas share the record
        found = [known for known in passes if torch.equal(known.tally, tally)]
        found = found or [known for known in passes if _close(known.tally, tally)]
        distinct = [known for i, known in enumerate(found) if not any(_alike(known, other) for other in found[:i])]
        if len(distinct) != 1:
            reason = "saw the same input with other statistics each" if distinct else "has had this input"
            raise RuntimeError(
                "activation checkpointing: a norm that applies its own statistics can't tell which "
                f"of its {len(self._passes)} forward passes is computed again: {'several' if distinct else 'none'} of them "
                f"{reason}; let fairseq_powernorm.statistics.RunningStatistics apply the statistics, once per step"
            )
        self._repeated.append(distinct[0])
        return distinct[0]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = torch.nan_to_num(one), torch.nan_to_num(other)
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def _alike(one: Pass, other: Pass) -> bool:
    """Would both passes compute the same from the same input? While PN divides by the batch's own moment, psi^2 is idle."""
    idle = one.spec is not None and one.spec.forward_batch
    return one.spec == other.spec and (idle or torch.equal(one.state, other.state))
