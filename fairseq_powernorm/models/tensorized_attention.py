"""Tensorized attention (Ma et al., A Tensorized Transformer for Language Modeling, NeurIPS 2019), without fairseq."""
from typing import Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: standard deviation of the weights at the start, that of Transformer-XL, on which the authors' model is built
INITIAL_STD = 0.02


def sinusoids(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoids of the positions 0, ..., length - 1: ``length x dim``, sines first, in the dtype of ``like``."""
    positions = torch.arange(length, dtype=torch.float64, device=like.device)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=like.device) / dim)
    angles = positions.unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim].to(like.dtype)


class TensorizedAttention(nn.Module):
    r"""Self-attention by a third-order tensor in block-term form, on a window of at most L tokens.

    With the projections q, k, v (R numbers each) of the window's tokens, p_j the projected sinusoid of position j,
    cores g^1, ..., g^C (diagonals of length R; C = 1 is the single-core form) and biases u, w:

    .. math::
        T_{ijk} = \frac1C \sum_c \sum_r g^c_r \bigl[ (q_{ir} + u_r) k_{jr} + (q_{ir} + w_r) p_{jr} \bigr] v_{kr},
        \qquad y_i = \sum_{j, k} T_{ijk} W_{jk}

    where the sum runs over j <= i and k <= i (``causal=True``) or over the whole window (``causal=False``, the
    published behaviour, in which y_i contains the token that a language model at i is asked for).

    **Windows shorter than L.** Positions i, j and k count from the window's first token: W_jk belongs to its j-th and
    k-th token and p_j to its j-th, however many tokens follow or padding precedes. So a shorter window uses the leading
    part of W, a causal y_i depends on the tokens up to i only and not on the window's length, and padding, left or
    right, is as if it were not there. (The authors' code feeds the sinusoid of L - 1 - j. That is a fixed linear map
    of the one of j, which the projection absorbs: the same model.)

    **Cost.** T has L^3 numbers a sentence and W has L^2 d. T never exists whole: ``block`` queries are taken at a time,
    against the j and k that they may see, and taken once more in the backward pass. For B sentences a layer keeps its
    input and about 6 B L R numbers for the backward pass, and needs about 3 B block L (R + L) while it works on a
    block, besides W, W's gradient and a copy of both. Measured, in float32: 4 + 4 MB kept and 34 MB at the peak for
    L = 32, B = 120, d = 256, R = 40; 5 + 5 and 77 MB for L = 80, B = 60. T alone would take 16 and 123 MB, several
    times over and in every layer. Multiplications: B L^3 (R + d), of which causality spares nearly two thirds.

    Args:
        dim: channels d
        window: L
        rank: R
        cores: C; as the cores share q, k and v (as in the paper), only their mean enters
        causal: restrict the sum to j <= i and k <= i
        block: queries taken at a time

    Shape:
        - input and output: ``T x B x C``, T at most L
        - ``padding_mask``: ``B x T`` bool, True at padding; what comes out at padding has no meaning

    Raises:
        ValueError: a size is not positive, or a window is longer than L
    """

    def __init__(self, dim: int, window: int, rank: int, cores: int = 1, causal: bool = True, block: int = 8):
        super().__init__()
        for name, value in (("dim", dim), ("window", window), ("rank", rank), ("cores", cores), ("block", block)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: must be positive")
        self.dim, self.window, self.rank, self.causal, self.block = dim, window, rank, causal, block
        self.q_proj = nn.Linear(dim, rank, bias=False)
        self.k_proj = nn.Linear(dim, rank, bias=False)
        self.v_proj = nn.Linear(dim, rank, bias=False)
        self.position_proj = nn.Linear(dim, rank, bias=False)
        self.core = nn.Parameter(torch.empty(cores, rank))
        self.content_bias = nn.Parameter(torch.empty(rank))
        self.position_bias = nn.Parameter(torch.empty(rank))
        #: W, one d-vector for each pair (j, k)
        self.out_weight = nn.Parameter(torch.empty(window, window, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "core":
                nn.init.uniform_(parameter)
            else:
                nn.init.normal_(parameter, std=INITIAL_STD)

    def share_biases(self, other: "TensorizedAttention") -> None:
        """Use the biases u and w of another layer."""
        self.content_bias, self.position_bias = other.content_bias, other.position_bias

    def extra_repr(self) -> str:
        return f"window={self.window}, rank={self.rank}, cores={len(self.core)}, causal={self.causal}"

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """See the class."""
        if x.size(0) > self.window:
            raise ValueError(f"a window of {x.size(0)} tokens: this attention was built for at most {self.window}")
        x = x.transpose(0, 1).contiguous()
        order = None
        if padding_mask is not None and bool(padding_mask[:, 0].any()):  # padding on the left
            order = padding_mask.to(torch.uint8).argsort(dim=1, stable=True).unsqueeze(-1)
            padding_mask = padding_mask.gather(1, order.squeeze(-1))
            x = x.gather(1, order.expand_as(x))
        y = self._attend(x, padding_mask)
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order.expand_as(y), y)
        return y.transpose(0, 1)

    def _attend(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """``B x T x C`` -> ``B x T x C``; no padding on the left."""
        length = x.size(1)
        if padding_mask is not None:
            padding_mask = padding_mask.unsqueeze(-1)
            x = x.masked_fill(padding_mask, 0.0)
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x) * self.core.mean(0)
        p = self.position_proj(sinusoids(length, self.dim, like=x))
        # (q + u) k + (q + w) p = q (k + p) + (u k + w p): only the first term depends on i
        slope, offset = k + p, self.content_bias * k + self.position_bias * p
        if padding_mask is not None:
            slope, offset = slope.masked_fill(padding_mask, 0.0), offset.masked_fill(padding_mask, 0.0)
        blocks = []
        for start in range(0, length, self.block):
            queries = q[:, start : start + self.block]
            seen = start + queries.size(1) if self.causal else length
            inputs = (queries, slope[:, :seen], offset[:, :seen], v[:, :seen], self.out_weight[:seen, :seen], start)
            if torch.is_grad_enabled():
                blocks.append(checkpoint(self._block, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                blocks.append(self._block(*inputs))
        return torch.cat(blocks, dim=1)

    def _block(self, q: Tensor, slope: Tensor, offset: Tensor, v: Tensor, weight: Tensor, start: int) -> Tensor:
        """Outputs of n queries from ``start`` on: q is ``B x n x R``, the others ``B x m x R``, W ``m x m x C``."""
        batch, n, _ = q.shape
        m = slope.size(1)
        by_rank = torch.addcmul(offset.unsqueeze(1), q.unsqueeze(2), slope.unsqueeze(1))  # B x n x m x R
        tensor = (by_rank.flatten(1, 2) @ v.transpose(1, 2)).view(batch, n, m, m)
        if self.causal:
            ahead = torch.arange(m, device=q.device) > torch.arange(start, start + n, device=q.device).unsqueeze(1)
            tensor = tensor.masked_fill_(ahead.unsqueeze(2) | ahead.unsqueeze(1), 0.0)
        return tensor.view(batch, n, m * m) @ weight.reshape(m * m, self.dim)
