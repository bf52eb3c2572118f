"""Regularized batch normalization, ``RegularizedBatchNorm``, and its penalty on the loss, ``penalty``."""
import weakref
from functools import partial
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from .. import functional
from ..functional.common import Function, Gradients
from .base import Device, State
from .checks import check_number
from .formula import FormulaNorm
from .recomputation import inside_backward
from .staging import Sums


class _Given(Function):
    """A penalty whose pass kept no graph (activation checkpointing): notes the gradient for the pass that is repeated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, penalties: "_Penalties") -> Tensor:
        ctx.penalties = penalties
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        ctx.penalties.gradient = grad.detach()
        return None, None, None


class _Joined(Function):
    """Identity for ``y``; the penalty receives a given gradient along with it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, penalty: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Gradients:
        return grad_y, ctx.gradient, None


class _Penalties:
    """The penalties of a norm's passes that nobody has asked for yet.

    A pass's penalty lives as long as the graph of its output: what is never differentiated is not kept.
    """

    def __init__(self) -> None:
        #: of passes, and of passes that are repeated (activation checkpointing), which may ask again
        self._with_graph: List[weakref.ref[Tensor]] = []
        self._repeated: List[weakref.ref[Tensor]] = []
        self._traced: Optional[Tensor] = None
        self._without_graph: Optional[Tensor] = None
        #: what has arrived at the penalties without graph
        self.gradient: Optional[Tensor] = None

    def add(self, penalty: Tensor, output: Tensor, *, repeated: bool) -> None:
        """Note the penalty of a pass with this output."""
        if torch.compiler.is_compiling():
            if self._traced is not None:
                raise RuntimeError(
                    "a compiled norm's penalty has not been taken since its last pass: call penalty(model) once in each "
                    "batch; and let no norm be used twice in one"
                )
            self._traced = penalty
        elif output.grad_fn is not None:
            node: Any = output.grad_fn
            node.metadata["penalty"] = penalty
            noted = self._repeated if repeated else self._with_graph
            noted[:] = [each for each in noted if each() is not None]
            noted.append(weakref.ref(penalty))
        elif not repeated:
            penalty = penalty.detach()
            self._without_graph = penalty if self._without_graph is None else self._without_graph + penalty
            self.gradient = None

    def take(self) -> List[Tensor]:
        """The penalties, each once; of the pass that is repeated if one is."""
        noted = self._repeated if inside_backward() else self._with_graph
        found = [penalty for penalty in (each() for each in noted) if penalty is not None]
        noted.clear()
        if self._traced is not None:
            found.append(self._traced)
            self._traced = None
        if self._without_graph is not None and not inside_backward():
            anchor = torch.zeros((), device=self._without_graph.device, requires_grad=True)
            found.append(_Given.apply(self._without_graph, anchor, self))
            self._without_graph = None
        return found

    def clear(self) -> None:
        """Forget them."""
        self._with_graph, self._repeated, self._traced, self._without_graph = [], [], None, None


class RegularizedBatchNorm(FormulaNorm):
    r"""Regularized batch normalization (RBN; Wang et al., NeurIPS 2022): batch normalization with a penalty on the distance
    between the statistics of a batch and the running ones, with which it is evaluated.

    With mean :math:`\mu` and biased variance :math:`\sigma^2` of the non-padding rows,

    .. math::
        y = \gamma\, \frac{u - \mu}{\sqrt{\max(\sigma^2, \epsilon)}} + \beta, \qquad
        P = p_{mean} \sum_c (m' - \mu)^2 + p_{var} \sum_c |v' - \sigma^2|

    where m' and v' are the running mean and variance after one step with this batch. P is added to the loss that is
    **summed** over tokens; its gradient flows through mu and sigma^2 only. The tasks of this package add it, scaled and
    normalized like the loss, and log it as ``norm_penalty``; in a training loop of your own, :func:`penalty` returns it.

    The published values are ``p_mean`` 0.1 and ``p_var`` 0.01 for pre-norm Transformers on IWSLT14, 60 and 0 for post-norm.

    With RunningStatistics, m and v take one step per optimizer step, exactly that of one batch of all rows, however these
    are cut. Output and penalty are those of the micro-batch in progress: each has a penalty of its own, with m' and v' after
    one step from the committed statistics with it alone, so that k micro-batches have k penalties, and k processes k. With
    ``sync="exact"`` mu and sigma^2 are those of all processes, which share one penalty by their numbers of rows: k ranks are
    one large batch. A batch that does not count has none.

    Args:
        dim: number of channels C
        eps: smallest variance that is divided by
        alpha_fwd: weight of the old value in the running mean and variance, in [0, 1]
        p_mean, p_var: weights of the penalty, zero for none
        groups: channel groups of a layer scale before it, 0 for none (as published)
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
        RuntimeError: training is exported with a penalty, which would be lost; or it is compiled, and :func:`penalty` has
            not been called since the last pass
    """

    CHECKS = {**FormulaNorm.CHECKS, **dict.fromkeys(("p_mean", "p_var"), partial(check_number, least=0.0))}
    STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
    STEPS = {"forward": ("iters", "running_mean", "running_var"), "backward": ()}
    ROOT = "clamped"

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.95,
        p_mean: float = 0.1,
        p_var: float = 0.01,
        groups: int = 0,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha_fwd, groups=groups, affine=affine, batch_first=batch_first,
            layout=layout, device=device, dtype=dtype,
        )
        self.p_mean = p_mean
        self.p_var = p_var
        self._penalties = _Penalties()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p_mean={self.p_mean}, p_var={self.p_var}"

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "_penalties": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._penalties = _Penalties()

    def _normalized(self, moments: functional.Moments, state: State, *, recomputed: bool) -> Tensor:
        running_mean, running_var = (state[name].to(moments.u.dtype) for name in ("running_mean", "running_var"))
        mean = functional.standing_in(moments, moments.mean, running_mean)
        var = functional.standing_in(moments, moments.var, running_var)
        z = self._watched((moments.u - mean) * torch.rsqrt(var.clamp(min=self.eps)), moments)
        y = self._with_affine(z)
        if self.p_mean == 0.0 and self.p_var == 0.0:
            return y
        penalty = self._penalty_of(mean, var, running_mean, running_var) * (moments.own / moments.total.clamp(min=1))
        self._collect(penalty, y, repeated=recomputed)
        if recomputed and self._penalties.gradient is not None and penalty.requires_grad:
            y = _Joined.apply(y, penalty, self._penalties.gradient)
        return y

    def _penalty_of(self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        """P for the statistics of a batch and the running ones before its step."""
        alpha = self.alpha_fwd
        next_mean = (alpha * running_mean + (1.0 - alpha) * mean).detach()
        next_var = (alpha * running_var + (1.0 - alpha) * var).detach()
        return self.p_mean * (next_mean - mean).square().sum() + self.p_var * (next_var - var).abs().sum()

    def _collect(self, penalty: Tensor, y: Tensor, *, repeated: bool) -> None:
        if torch.compiler.is_compiling() and _is_exporting():
            raise RuntimeError(
                f"export of a {type(self).__name__} in training: its penalty would be lost; build it with p_mean=0, p_var=0"
            )
        self._penalties.add(penalty, y, repeated=repeated)
        if torch.compiler.is_compiling() or functional.in_transform() or repeated:
            return
        if self.stage is None and y.requires_grad:
            penalties = self._penalties
            y.register_hook(lambda grad: penalties.clear())  # the batch's backward pass has begun: it is too late to ask

    def forget_batch(self) -> None:
        self._penalties.clear()

    def take_penalties(self) -> List[Tensor]:
        """The penalties of the training passes since the last call, see :func:`penalty`."""
        return self._penalties.take()

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        mean, var = self._mean_and_var(sums)
        return self._moved(state, sums, alpha_fwd, {"running_mean": mean, "running_var": var})

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        _, var = self._mean_and_var(forward)
        inv2 = var.clamp(min=self.eps).reciprocal()
        through_var = torch.where(var > self.eps, inv2, 0.0)
        return self._describe(state, state["running_var"], forward, backward, inv2, through_var)


def _is_exporting() -> bool:
    asked = getattr(torch.compiler, "is_exporting", None)
    return asked is not None and bool(asked())


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties that the norms of a model ask for, a scalar to be added to the loss summed over tokens.

    .. code-block:: python

        loss = criterion(model(batch), target) + penalty(model)     # criterion sums over tokens
        loss.backward()

    Once in each batch, after the forward and before the backward pass: it is the sum over the training passes since the last
    call, backward pass, or beginning of ``RunningStatistics.batch()``. It is a part of the loss like any other: scaling,
    gradient accumulation, mixed precision and activation checkpointing of either kind treat it as such.

    Args:
        model: any module; without a :class:`RegularizedBatchNorm` in training its penalty is zero
    """
    found = [each for norm in model.modules() if isinstance(norm, RegularizedBatchNorm) for each in norm.take_penalties()]
    return sum(found[1:], found[0]) if found else torch.zeros(())
