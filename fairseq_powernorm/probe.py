r"""What BN and PN-V would make of one and the same gradient: is the gradient of PN-V the smaller one?

Shen et al. (ICML 2020, section 4) compare the two by their Lipschitz constants. Per channel, with the B rows u that reach a
norm (after its layer scale), d the gradient that arrives there (times ``weight``), and x the normalized rows, the gradients
that leave are

.. math:: \Big\|\frac{\partial L}{\partial u}\Big\|^2 = \frac{1}{\sigma^2 + \epsilon}
    \Big(\|d\|^2 - \frac{\langle d, 1\rangle^2}{B} - (2 - q) \frac{\langle d, x\rangle^2}{B}\Big) \text{ (BN)}, \qquad
    \frac{1}{\psi^2 + \epsilon} \Big(\|d\|^2 - (2 - q) \frac{\langle d, x\rangle^2}{B}\Big) \text{ (PN-V)}

where q is the mean of x^2: 1 but for :math:`\epsilon`. PN-V divides by more, since :math:`\psi^2 = \sigma^2 + \mu^2`, and
takes away less. Which one is smaller depends on the data, and is measured here, norm by norm.
"""
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from . import functional
from .kernels import eager
from .norms import RunningNorm
from .norms.masks import valid_rows

#: sums over rows, each C: u, u^2, d, d^2, d u
_SUMS = 5


def gradient_norms(sums: Tensor, rows: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """Squared norms, per channel, of the gradients that leave BN and PN-V.

    Args:
        sums: ``... x 5 x C``: sums over rows of u, u^2, d, d^2 and d u
        rows: number of rows (``...``)
        eps: of the norms

    Returns:
        those of BN and of PN-V, ``... x C``
    """
    rows = rows.unsqueeze(-1).clamp(min=1)
    u, square, grad, grad_square, product = sums.unbind(-2)
    mean, moment = u / rows, square / rows
    var = (moment - mean.square()).clamp(min=0)
    found = []
    for second, along, constant in ((var, product - mean * grad, grad.square() / rows), (moment, product, 0.0)):
        inv2 = 1.0 / (second + eps)
        # <d, x>^2 / B with x = (u - mean) * sqrt(inv2), and q = second * inv2
        through = along.square() * inv2 / rows * (2.0 - second * inv2)
        found.append((inv2 * (grad_square - constant - through)).clamp(min=0))
    return found[0], found[1]


class GradientProbe:
    """Gathers sums at the norms of a model over one training step, by hooks that are there for that step only.

    Args:
        norms: name -> norm with running statistics
        total: turns a vector of sums into its total over the processes that share a batch
    """

    def __init__(self, norms: Mapping[str, RunningNorm], total: Callable[[Tensor], Tensor] = lambda vector: vector):
        self._norms = dict(norms)
        self._total = total
        self._sums: Dict[str, Tensor] = {}
        self._hooks: List[Any] = []

    def begin(self) -> None:
        """Gather from now on, beginning anew."""
        self.end()
        for name, norm in self._norms.items():
            dtype = eager.sum_dtype(norm.iters)
            self._sums[name] = torch.zeros(_SUMS * norm.dim + 1, dtype=dtype, device=norm.iters.device)
            self._hooks.append(norm.register_forward_hook(self._hook(name), with_kwargs=True))

    def end(self) -> None:
        """Gather no more, and forget."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sums = [], {}

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(norm: RunningNorm, args: Tuple[Any, ...], kwargs: Dict[str, Any], y: Tensor) -> None:
            stage = norm.stage
            if not norm.training or not y.requires_grad or (stage is not None and not stage.switches.counting):
                return
            x = args[0] if args else kwargs["x"]
            mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")
            if mask is None and norm.mask_slot is not None:
                mask = norm.mask_slot.fitting(norm, x.movedim(1, -1) if norm.layout == "channels_first" else x)
            scale = 1.0 if stage is None else stage.switches.gradient_scale
            transposed = x.dim() == 3 and norm.layout == "time_first"
            y.register_hook(lambda grad: self._add(name, x.detach(), grad.detach(), mask, scale, transposed=transposed))

        return hook

    @torch.no_grad()
    def _add(
        self, name: str, x: Tensor, grad: Tensor, mask: Optional[Tensor], scale: Any, *, transposed: bool
    ) -> None:
        norm, sums = self._norms[name], self._sums.get(name)
        if sums is None:
            return
        if norm.layout == "channels_first" and x.dim() > 2:
            x, grad = x.movedim(1, -1), grad.movedim(1, -1)
        u = functional.layer_scale(x.reshape(-1, norm.dim).to(eager.compute_dtype(x)), norm.groups).to(sums.dtype)
        d = grad.reshape(-1, norm.dim).to(sums.dtype) / scale
        if norm.weight is not None:
            d = d * norm.weight.to(sums.dtype)
        if mask is not None:
            valid = valid_rows(mask, transposed)
            u, d = u[valid], d[valid]
        columns = (u, u.square(), d, d.square(), d * u)
        sums += torch.cat([*(each.sum(0) for each in columns), sums.new_full((1,), u.size(0))])

    @torch.no_grad()
    def describe(self) -> Dict[str, Dict[str, float]]:
        """What the step's sums say, of all processes; they must all call it.

        Returns:
            name -> ``gradient_ratio``: norm of PN-V's gradient over that of BN's, and ``gradient_smaller``: the share of
            channels in which PN-V's is smaller. Norms through which no gradient came are left out, and so is what is not
            finite.
        """
        if not self._sums:
            return {}
        total = self._total(torch.cat(list(self._sums.values())))
        found: Dict[str, Dict[str, float]] = {}
        for (name, norm), sums in zip(self._norms.items(), total.split([each.numel() for each in self._sums.values()])):
            bn, pn_v = gradient_norms(sums[:-1].view(_SUMS, norm.dim), sums[-1], norm.eps)
            ratio, smaller = torch.stack([(pn_v.sum() / bn.sum()).sqrt(), (pn_v < bn).to(bn.dtype).mean()]).tolist()
            if 0.0 < ratio < float("inf"):
                found[name] = {"gradient_ratio": ratio, "gradient_smaller": smaller}
        return found
