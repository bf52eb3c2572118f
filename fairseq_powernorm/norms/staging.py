"""Where norms leave the sums of their batches for somebody else to apply: see :mod:`fairseq_powernorm.statistics`."""
from typing import Callable, Mapping, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

#: the parts of a training step that yield sums
PARTS = ("forward", "backward")


class Switches:
    """What the stages of one model have in common.

    Attributes:
        open: whether a batch is in progress; a training pass outside of one is an error
        counting: whether the batch in progress counts. If not (a dummy batch), nothing is added and the batch is
            treated like padding: the norms pass on the gradient that arrives and add none
        gradient_scale: factor of the loss whose gradient arrives
        batch_statistics: PN divides by the batch's own second moment, as in its warm-up
        recording: PN-V and BN, too, add the sums of their backward pass (PN always does)
        reduce: turns a vector of sums into its total over all processes that share a batch; None if there is one
    """

    def __init__(self) -> None:
        self.open = False
        self.counting = False
        self.gradient_scale: Union[float, Tensor] = 1.0
        self.batch_statistics = False
        self.recording = False
        self.reduce: Optional[Callable[[Tensor], Tensor]] = None

    def check_open(self, what: str) -> None:
        """Raise RuntimeError outside of a batch, whose statistics nobody would count."""
        if not self.open:
            raise RuntimeError(
                f"a {what} pass in training outside of RunningStatistics.batch(): wrap forward and backward pass of each "
                "batch in 'with statistics.batch():', or call statistics.release() to let the norms apply their statistics "
                "themselves"
            )


class Stage:
    """Where a norm adds the sums of its batches, ``[sums (each C), rows, calls]``, for somebody else to apply.

    Args:
        switches: shared by all norms of a model
        parts: name of a part (``forward``, ``backward``) -> the vector to add to
    """

    def __init__(self, switches: Switches, parts: Mapping[str, Tensor]):
        self.switches = switches
        self.parts = parts

    def add(self, part: str, tally: Tensor) -> None:
        """Add the tally of one pass, ``[sums, rows, 1]``, if the batch counts.

        Raises:
            RuntimeError: no batch is in progress, or a setting has changed by which the norm yields other sums
        """
        self.switches.check_open(part)
        if self.parts[part].shape != tally.shape:
            raise RuntimeError(
                "RunningStatistics: a norm yields other sums than when it was taken over, as one of its settings was changed"
                " (variant, filter_outliers): release() the statistics and make new ones"
            )
        if self.switches.counting:
            self.parts[part].add_(tally)


class Sums(NamedTuple):
    """Sums over the batches of one training step: one tensor (``... x C``) per name of ``RunningNorm.SUMS``.

    ``rows`` (``... x 1`` or a scalar) is the number of rows they were taken over.
    """

    sums: Sequence[Tensor]
    rows: Tensor

    @classmethod
    def of(cls, tally: Tensor, dim: int) -> "Sums":
        """Take ``[sums (C = dim each), rows, 1]`` (last dimension) apart."""
        return cls(torch.split(tally[..., :-2], dim, dim=-1), tally[..., -2:-1])

    def means(self) -> Sequence[Tensor]:
        """Means over rows; 0 where there are none."""
        rows = self.rows.clamp(min=1)
        return [each / rows for each in self.sums]
