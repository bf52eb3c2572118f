"""A second implementation of each norm with a window or a formula, in plain float64 and one step at a time."""
import torch


def scaled(x, groups):
    """Layer scale of rows, N x C."""
    if not groups:
        return x
    parts = x.view(len(x), groups, -1)
    return (parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view_as(x)


class Reference:
    """Base: rows in, rows out; ``step`` is one training step, ``evaluate`` an evaluation.

    Args:
        norm: whose settings, parameters and statistics are taken over
    """

    def __init__(self, norm):
        self.o = norm  # settings
        self.weight, self.bias = (p.detach().clone().double().requires_grad_() for p in (norm.weight, norm.bias))
        self.t = int(norm.iters)
        self.buffers = {name: b.detach().clone().double() for name, b in norm.named_buffers() if name != "iters"}

    def step(self, x, dy, valid):
        """Output, gradients of x, weight and bias; no gradient arrives at padding."""
        x = x.clone().requires_grad_()
        self.weight.grad = self.bias.grad = None
        u = scaled(x, self.o.groups)
        y, loss = self.forward(u, u[valid])
        (loss + (y * dy).sum()).backward()
        self.t += 1
        return y.detach(), x.grad, self.weight.grad, self.bias.grad

    def moved(self, name, batch, alpha=None):
        alpha = self.o.alpha_fwd if alpha is None else alpha
        self.buffers[name] = alpha * self.buffers[name] + (1 - alpha) * batch.detach()


class BatchRenorm(Reference):
    def forward(self, u, kept):
        o, b = self.o, self.buffers
        mean, std = kept.mean(0), kept.std(0, unbiased=False) + o.eps
        late = self.t - o.warmup_updates
        r_max = 1 + (o.r_max - 1) * min(max(late / o.r_updates, 0), 1)
        d_max = o.d_max * min(max(late / o.d_updates, 0), 1)
        r = (std / b["running_std"]).detach().clamp(1 / r_max, r_max)
        d = ((mean - b["running_mean"]) / b["running_std"]).detach().clamp(-d_max, d_max)
        y = ((u - mean) / std * r + d) * self.weight + self.bias
        self.moved("running_mean", mean)
        self.moved("running_std", std)
        return y, 0.0

    def evaluate(self, u):
        return (u - self.buffers["running_mean"]) / self.buffers["running_std"] * self.weight + self.bias


class Regularized(Reference):
    def forward(self, u, kept):
        mean, var = kept.mean(0), kept.var(0, unbiased=False)
        self.moved("running_mean", mean)
        self.moved("running_var", var)
        self.penalty = self.o.p_mean * (self.buffers["running_mean"] - mean).square().sum()
        self.penalty = self.penalty + self.o.p_var * (self.buffers["running_var"] - var).abs().sum()
        return (u - mean) / var.clamp(min=self.o.eps).sqrt() * self.weight + self.bias, self.penalty

    def evaluate(self, u):
        sigma = self.buffers["running_var"].clamp(min=self.o.eps).sqrt()
        return (u - self.buffers["running_mean"]) / sigma * self.weight + self.bias


class Progressive(Reference):
    def __init__(self, norm):
        super().__init__(norm)
        self.alpha = norm.alpha.detach().clone().requires_grad_()
        self.layer = [p.detach().clone().requires_grad_() for p in (norm.layer_weight, norm.layer_bias)]

    def mixture(self, u, mean, var):
        share = max(0.0, 1 - self.t / self.o.total_updates)
        layer = torch.nn.functional.layer_norm(u, (u.size(1),), *self.layer, self.o.eps)
        batch = (u - mean) / (var + self.o.eps).sqrt() * self.weight + self.bias
        return share * layer + (1 - share) * (batch + self.alpha * u)

    def forward(self, u, kept):
        mean, var = kept.mean(0), kept.var(0, unbiased=False)
        y = self.mixture(u, mean, var)
        self.moved("running_mean", mean)
        self.moved("running_var", kept.var(0))
        return y, 0.0

    def evaluate(self, u):
        return self.mixture(u, self.buffers["running_mean"], self.buffers["running_var"])


class Window(Reference):
    """MABN and UN; ``number`` counts steps from 1, as their authors do."""

    def __init__(self, norm):
        super().__init__(norm)
        self.unified = hasattr(norm, "ema_gz")

    def mean(self, window):
        return window.log().mean(0).exp() if self.unified else window.mean(0)

    def step(self, x, dy, valid):
        o, b = self.o, self.buffers
        number, place = self.t + 1, self.t % o.window
        root = (x.view(len(x), o.groups, -1).square().mean(-1) + 1e-5).sqrt() if o.groups else None
        u = scaled(x, o.groups)
        m2 = u[valid].square().mean(0)
        spread = b["window_m2"].sqrt().var()
        b["window_m2"][place] = m2
        averaged = number > o.window and number >= o.warmup_updates
        outlier = False
        if averaged and getattr(o, "filter_outliers", False):
            window = b["window_m2"]
            outlier = bool((window.mean(0) - window.log().mean(0).exp() > o.window * spread).any())
            if outlier:
                window[place] = b["running_var"]
        var = self.mean(b["window_m2"]) if averaged and not outlier else m2
        r = ((var + o.eps) / (b["running_var"] + o.eps)).sqrt().clamp(1 / 5, 5)
        if number <= max(o.rescale_after, o.warmup_updates) or outlier:
            r = torch.ones_like(r)
        z = u / (var + o.eps).sqrt()
        w = self.weight.detach()
        y = (z if self.unified else r * z) * w + self.bias.detach()
        self.moved("running_var", var)
        # backward
        g = dy * w * r
        gz = (g * z)[valid].mean(0)
        b["window_gz"][place] = b["ema_gz"] if outlier else gz
        moment = b["window_gz"].mean(0) if averaged and not outlier else gz
        if self.unified:
            self.moved("ema_gz", moment, o.alpha_bkw)
            moment = moment if outlier else b["ema_gz"]
        du = (g - z * moment) / (var + o.eps).sqrt()
        if o.groups:
            parts, us = du.view(len(x), o.groups, -1), u.view(len(x), o.groups, -1)
            du = ((parts - us * (parts * us).mean(-1, keepdim=True)) / root.unsqueeze(-1)).view_as(x)
        du = du * valid.unsqueeze(1)
        self.t += 1
        return y, du, (dy * r * z)[valid].sum(0), dy[valid].sum(0)

    def evaluate(self, u):
        return u / (self.buffers["running_var"] + self.o.eps).sqrt() * self.weight + self.bias


REFERENCES = {"batch-renorm": BatchRenorm, "rbn": Regularized, "prepbn": Progressive, "mabn": Window, "un": Window}
