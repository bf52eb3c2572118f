"""Norms that divide by second moments of several steps: ``MovingAverageBatchNorm`` (MABN) and ``UnifiedNorm`` (UN)."""
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .. import functional
from ..functional.moments import count_rows, scaled_rows, sum_rows
from ..kernels import eager
from .base import Device, State
from .checks import check_flag, check_interval, check_updates, is_count
from .distances import discrepancy, size_of
from .formula import FormulaNorm
from .staging import Sums

#: bounds of the factor between the window's standard deviation and the running one
LEAST, MOST = 1 / 5, 5.0


class _Measured(NamedTuple):
    """A batch's second moment (``C``), over all processes if they share it, and the number of its rows (scalar)."""

    moment: Tensor
    rows: Tensor


class _Divisor(NamedTuple):
    """What a step divides by.

    Attributes:
        var: ``... x C``
        r: ``... x C``, its root divided by the running variance's, within bounds
        averaged: ``... x 1`` bool: it is an average of the window
        outlier: ``... x 1`` bool: the batch is kept out of the window
    """

    var: Tensor
    r: Tensor
    averaged: Tensor
    outlier: Tensor


class WindowNorm(FormulaNorm):
    """Base of MABN and UN: windows of the second moment and of the gradient moment of the last W steps.

    The step after t steps has the place ``t % W`` in both windows, so that ``iters`` says where a resumed run goes on. A
    step without rows, or whose moment is not finite, leaves that of W steps before there, or the running variance if there
    was none.
    """

    #: is the window's mean the geometric one?
    GEOMETRIC = False
    #: does ``r`` multiply the output, or the gradients only?
    RESCALE = True
    CHECKS = {**FormulaNorm.CHECKS, **dict.fromkeys(("warmup_updates", "rescale_after"), check_updates)}
    MEAN = None
    STATISTICS = {"running_var": 1.0, "window_m2": 0.0, "window_gz": 0.0}
    STEPS = {"forward": ("iters", "running_var", "window_m2"), "backward": ("window_gz",)}

    #: are batches that differ too much from the window kept out of it?
    filter_outliers = False
    alpha_bkw: Optional[float] = None
    running_var: Tensor
    window_m2: Tensor
    window_gz: Tensor

    def __init__(self, dim: int, *, window: int, warmup_updates: int, rescale_after: int, **options: Any):
        if not is_count(window, least=1):
            raise ValueError(f"window={window!r}: must be 1 or more steps")
        super().__init__(dim, windows={"window_m2": window, "window_gz": window}, **options)
        self.window = window
        self.warmup_updates = warmup_updates
        self.rescale_after = rescale_after

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, window={self.window}, warmup_updates={self.warmup_updates}, "
            f"rescale_after={self.rescale_after}"
        )

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "window" and not (is_count(value) and value == self.windows["window_m2"]):
            steps = self.windows["window_m2"]
            raise ValueError(f"window={value!r}: must stay {steps}, the number of steps in its buffers; or build a new norm")
        super()._check_setting(name, value)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A state_dict of another norm, loaded with ``strict=False``, may have the steps and no window of them."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        has_window, *others = (prefix + name in state_dict for name in ("window_m2", "iters", "running_var"))
        known = not (self.running_var.is_meta or self.window_m2.is_meta)
        if all(others) and known and not has_window and not bool(self.window_m2.any()):
            with torch.no_grad():
                self.window_m2.copy_(self.running_var)  # zeros would draw the mean over the window to zero

    @property
    def SUMS(self) -> Mapping[str, Tuple[str, ...]]:  # type: ignore[override]
        return {"forward": ("u^2",), "backward": ("dz * z", "outliers") if self.filter_outliers else ("dz * z",)}

    # ------------------------------------------------------------------ training

    def _measure(self, x: Tensor, valid: Optional[Tensor]) -> Tuple[Tensor, Any]:
        u, column = scaled_rows(x.detach(), valid, self.groups)
        tally = eager.tally(sum_rows(u.square(), column), rows=count_rows(u, column))
        total = tally if self._reduce is None else self._reduce(functional.unwrapped(tally))
        moment = (total[:-2] / total[-2].clamp(min=1)).to(u.dtype)
        return tally, _Measured(moment, total[-2].to(u.dtype))

    def _output(
        self, x: Tensor, valid: Optional[Tensor], moments: _Measured, state: State, *, recomputed: bool
    ) -> Tensor:
        dtype = moments.moment.dtype
        steps = state["iters"].reshape(1).to(dtype, copy=True)
        running, window = state["running_var"].to(dtype), state["window_m2"].to(dtype)
        batch = torch.where(moments.rows > 0, moments.moment, running)
        divisor = self._divisor_of(batch, steps, running, window)
        switches = None if self.stage is None else self.stage.switches
        spec = functional.WindowSpec(
            groups=self.groups,
            rescale=self.RESCALE,
            alpha_bkw=self.alpha_bkw,
            gradient_scale=1.0 if switches is None else switches.gradient_scale,
            counting=switches is None or switches.counting,
        )
        average = self.statistic("ema_gz") if "ema_gz" in self._buffers else None
        known = functional.WindowState(steps, divisor.averaged, divisor.outlier, self.statistic("window_gz"), average)
        return functional.window_norm(
            x, *self._affine(), valid, torch.rsqrt(divisor.var + self.eps), divisor.r, known, spec,
            self._collector(known), self._reduce, self._lock,
        )  # fmt: skip

    def _collector(self, known: functional.WindowState) -> functional.Collect:
        """Takes in what the backward pass of a step yields that has read this. What it has read takes the step, though the
        norm may have other buffers by then, as after ``torch.func.functional_call``.
        """
        compiling = torch.compiler.is_compiling()  # whose graphs take buffers of modules only
        read = {"window_gz": known.window} if known.average is None else {"window_gz": known.window, "ema_gz": known.average}

        def collect(part: str, tally: Tensor) -> None:
            if not self.filter_outliers:
                tally = torch.cat([tally[: self.dim], tally[-2:]])
            if self.stage is not None:
                self._take(part, tally)
            else:
                buffers = {name: self.statistic(name) for name in type(self).STEPS[part]} if compiling else read
                self.step_(part, tally, {"iters": known.steps + 1, **buffers})

        return collect

    def _divisor_of(self, batch: Tensor, steps: Tensor, running: Tensor, window: Tensor) -> _Divisor:
        """What the step after ``steps`` (``... x 1``) steps divides by.

        Args:
            batch: ``... x C``, its second moment
            running: ``... x C``, running variance before it
            window: ``... x W x C``, second moments of the steps before it
        """
        filled = functional.put(window, steps, batch)
        averaged = self._averages(steps)
        outlier = torch.zeros_like(averaged)
        if self.filter_outliers:
            spread = window.sqrt().flatten(-2).var(-1, keepdim=True) if self.window * self.dim > 1 else 0.0
            apart = filled.mean(-2) - _geometric_mean(filled) > self.window * spread
            outlier = averaged & apart.any(-1, keepdim=True)
        averaged = averaged & outlier.logical_not()
        mean = _geometric_mean(filled) if self.GEOMETRIC else filled.mean(-2)
        var = torch.where(averaged, mean, batch)
        r = ((var + self.eps) / (running + self.eps)).sqrt().clamp(LEAST, MOST)
        rescaled = (steps >= max(self.rescale_after, self.warmup_updates)) & outlier.logical_not()
        r = torch.where(rescaled & (not self._batch_alone), r, 1.0)
        return _Divisor(var, r, averaged, outlier)

    def _averages(self, steps: Tensor) -> Tensor:
        """Does the step after ``steps`` steps average over the window: is the warm-up over, and the window full?"""
        after = steps >= max(self.window, self.warmup_updates - 1)
        return after & (not self._batch_alone)

    # ------------------------------------------------------------------ statistics

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        some = sums.rows > 0
        if part == "backward":
            own = sums.means()
            steps = state["iters"] - 1
            outlier = own[1][..., :1] > 0.5 if self.filter_outliers else torch.zeros_like(some)
            averaged = self._averages(steps) & outlier.logical_not()
            _, window, average = functional.gradient_moment(
                own[0], steps, averaged, outlier, state["window_gz"], state.get("ema_gz"), self.alpha_bkw
            )
            new = {"window_gz": torch.where(some.unsqueeze(-1), window, state["window_gz"])}
            if average is not None:
                new["ema_gz"] = torch.where(some, average, state["ema_gz"])
            return new
        (batch,) = sums.means()
        running, window = state["running_var"], state["window_m2"]
        divisor = self._divisor_of(batch, state["iters"], running, window)
        moved = self._moved(state, sums, alpha_fwd, {"running_var": divisor.var})
        known = some & torch.isfinite(batch).all(-1, keepdim=True)
        place = torch.where(functional.slots(window, state["iters"]), window, 0.0).sum(-2)
        # without a moment of its own a step changes nothing, but a place left empty would draw the mean to zero
        vacant = divisor.outlier | (known | (place > 0).any(-1, keepdim=True)).logical_not()
        value = torch.where(vacant, running, torch.where(known, batch, place))
        moved["window_m2"] = functional.put(window, state["iters"], value)
        return moved

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (batch,) = forward.means()
        divisor = self._divisor_of(batch, state["iters"], state["running_var"], state["window_m2"])
        moment, _, _ = functional.gradient_moment(
            backward.means()[0], state["iters"], divisor.averaged, divisor.outlier, state["window_gz"],
            state.get("ema_gz"), self.alpha_bkw,
        )  # fmt: skip
        inv2 = 1.0 / (divisor.var + self.eps)
        deviation = inv2.rsqrt() / divisor.r if self.RESCALE else inv2.rsqrt()
        return {
            "distance_var": size_of(batch - state["running_var"]),
            "size_var": size_of(state["running_var"]),
            "gradient_var": (moment.square() * inv2 * (batch * inv2)).sum(-1).sqrt(),
            **discrepancy(deviation, 1.0 / self.inverse(state["running_var"])),
        }


def _geometric_mean(window: Tensor) -> Tensor:
    """Over the W values of ``... x W x C``."""
    return window.log().mean(-2).exp()


class MovingAverageBatchNorm(WindowNorm):
    r"""Moving average batch normalization (MABN; Yan et al., ICLR 2020): no centring, moments of the last W steps.

    With the mean square :math:`\chi^2` of the non-padding rows and averages over the last W steps, the present one among
    them,

    .. math::
        \sigma^2 = \overline{\chi^2}, \qquad z = u / \sqrt{\sigma^2 + \epsilon}, \qquad y = \gamma\, r z + \beta, \qquad
        r = \mathrm{clamp}\Bigl(\sqrt{\tfrac{\sigma^2 + \epsilon}{v + \epsilon}},\ \tfrac15,\ 5\Bigr) \\
        g = \gamma\, r\, dy, \qquad du = (g - z\, \overline{\langle g z \rangle}) / \sqrt{\sigma^2 + \epsilon}, \qquad
        v \leftarrow \alpha_f v + (1 - \alpha_f)\, \sigma^2

    where :math:`\langle g z \rangle` is the mean over the non-padding rows. In the first W steps, and before step number
    ``warmup_updates``, both averages are the batch's own value, with which the gradient is exact; up to step number
    ``rescale_after``, and at least to the end of the warm-up, r = 1. Evaluation divides by ``sqrt(v + eps)``.

    Padding is normalized like the other rows; it counts in no mean, receives no gradient and gives none.

    With RunningStatistics there is one step per optimizer step: v and the windows are exactly those of one batch of all
    rows, however these are cut, as far as outputs and gradients are. The present step's share in the averages that a
    micro-batch is normalized by (1 of W) is its own, or with ``sync="exact"`` that of all processes: k ranks with ``exact``
    are one large batch, k micro-batches are not.

    Args:
        dim: number of channels C
        eps: added to the variance under the root
        alpha_fwd: weight of the old value in the running variance v, in [0, 1]
        window: W, 1 or more
        warmup_updates: steps without averages
        rescale_after: steps with r = 1
        groups: channel groups of a layer scale before it, 0 for none (as published)
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.98,
        window: int = 16,
        warmup_updates: int = 100,
        rescale_after: int = 1000,
        groups: int = 0,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha_fwd, window=window, warmup_updates=warmup_updates, rescale_after=rescale_after,
            groups=groups, affine=affine, batch_first=batch_first, layout=layout, device=device, dtype=dtype,
        )  # fmt: skip


class UnifiedNorm(WindowNorm):
    r"""Unified normalization (UN; Yang et al., ACM MM 2022): as MABN, with a geometric mean and a smoothed gradient moment.

    With the mean square :math:`\chi^2` of the non-padding rows over the last W steps, the present one among them,

    .. math::
        \sigma^2 = \Bigl(\prod \chi^2\Bigr)^{1/W}, \qquad z = u / \sqrt{\sigma^2 + \epsilon}, \qquad
        y = \gamma z + \beta, \qquad
        r = \mathrm{clamp}\Bigl(\sqrt{\tfrac{\sigma^2 + \epsilon}{v + \epsilon}},\ \tfrac15,\ 5\Bigr) \\
        g = \gamma\, r\, dy, \qquad e \leftarrow \alpha_b e + (1 - \alpha_b)\, \overline{\langle g z \rangle}, \qquad
        du = (g - z e) / \sqrt{\sigma^2 + \epsilon}, \qquad d\gamma = \sum r\, dy\, z

    where :math:`\langle g z \rangle` is the mean over the non-padding rows and v the running variance, as in
    :class:`MovingAverageBatchNorm`: so are the warm-up, ``rescale_after``, padding, evaluation, and what is exact over ranks
    and micro-batches. r does not change the output: it scales the gradients of x and weight only. e smooths the gradient
    from the first step on, so that it is never exact.

    With ``filter_outliers``, once the averages are in use, a batch is an outlier if in any channel the arithmetic mean of
    its window exceeds the geometric one by more than W times the variance of the square roots in the window of before: it
    divides by its own second moment with the exact gradient and r = 1, and the windows take v and e instead of its moments.
    Of a step with several micro-batches the windows leave out the gradient moment if most rows were in outliers.

    Args:
        dim: number of channels C
        eps: added to the variance under the root
        alpha_fwd: weight of the old value in the running variance v, in [0, 1]
        alpha_bkw: weight of the old value in the running gradient moment e, in [0, 1]
        window: W, 1 or more
        warmup_updates: steps without averages over the window
        rescale_after: steps with r = 1
        filter_outliers: keep outliers out of the windows; the authors advise against it for text
        masked: leave out padding; the authors' Transformers call it without the mask (false), and all rows count
        groups: channel groups of a layer scale before it, 0 for none (as published)
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    GEOMETRIC = True
    RESCALE = False
    CHECKS = {
        **WindowNorm.CHECKS, "alpha_bkw": check_interval, "filter_outliers": check_flag, "masked": check_flag
    }
    STATISTICS = {**WindowNorm.STATISTICS, "ema_gz": 0.0}
    STEPS = {**WindowNorm.STEPS, "backward": ("window_gz", "ema_gz")}

    ema_gz: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        window: int = 4,
        warmup_updates: int = 4000,
        rescale_after: int = 1000,
        filter_outliers: bool = False,
        masked: bool = True,
        groups: int = 0,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha_fwd, window=window, warmup_updates=warmup_updates, rescale_after=rescale_after,
            groups=groups, affine=affine, batch_first=batch_first, layout=layout, device=device, dtype=dtype,
        )  # fmt: skip
        self.alpha_bkw = alpha_bkw
        self.filter_outliers = filter_outliers
        self.masked = masked

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha_bkw={self.alpha_bkw}, filter_outliers={self.filter_outliers}, "
            f"masked={self.masked}"
        )

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        counting = self.stage is None or self.stage.switches.counting
        return super()._train(x, valid if self.masked or not counting else None, special=special)
