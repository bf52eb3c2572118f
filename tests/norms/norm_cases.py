"""What the tests of the norms share: every norm with every variant, batches, training, comparison."""
import torch

from fairseq_powernorm.norms import NORMS, RowNorm, RunningNorm, build_norm

C, GROUPS = 16, 2
RUNNING = [name for name, kind in NORMS.items() if issubclass(kind, RunningNorm)]
#: every norm with running statistics, in each of its variants
CASES = [(name, variant) for name in RUNNING for variant in getattr(NORMS[name], "VARIANTS", (None,))]
#: every norm
ALL = [(name, None) for name in NORMS if name not in RUNNING] + CASES
#: options that a norm has no default for
REQUIRED = {name: dict.fromkeys(kind.REQUIRED, 3) for name, kind in NORMS.items() if hasattr(kind, "REQUIRED")}
#: the norms whose gradient is an approximation
APPROXIMATE = ("power", "mabn", "un")


def new(name, variant=None, dim=C, **options):
    """A norm as it is built, with an option that it has no default for."""
    return build_norm(name, dim, **REQUIRED.get(name, {}), **({"variant": variant} if variant else {}), **options)


def make(name, variant=None, dtype=torch.float32, **options):
    """A norm with parameters and statistics that are no round numbers."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        options = {"groups": GROUPS, **options}
        if issubclass(NORMS[name.partition(":")[0]], RowNorm):
            options["groups"] = max(1, options["groups"])  # 0 turns off the layer scale before a norm
        norm = new(name, variant, **options).to(dtype)
        with torch.no_grad():
            for key, each in norm.state_dict().items():
                if key != "iters":
                    each.copy_(torch.rand(each.shape, dtype=torch.float32, device="cpu") + 0.5)
    return norm


def batch(step=0, dtype=torch.float32):
    """x, dy (5 x 3 x C), mask (3 x 5)."""
    generator = torch.Generator("cpu").manual_seed(step)
    x, dy = torch.randn(2, 5, 3, C, generator=generator, dtype=torch.float32, device="cpu").to(dtype).unbind()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] + [False] * 4], device="cpu")
    return x, dy, mask


def train(norm, steps=3, dtype=torch.float32, make_x=lambda x: x, make_dy=lambda dy: dy, call=None, first=0):
    """Outputs, gradients, buffers of some steps, and the evaluation after them."""
    found = []
    norm.train()
    for step in range(first, first + steps):
        x, dy, mask = batch(step, dtype)
        leaf = x.clone().requires_grad_()
        y = (call or norm)(make_x(leaf), mask)
        y.backward(make_dy(dy))
        found += [y.detach(), leaf.grad]
    norm.eval()
    found += [norm(make_x(x), mask).detach()]
    return found + [p.grad for p in norm.parameters()] + list(norm.buffers())


def assert_all_close(found, expected, tolerance=2e-6):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        assert torch.isfinite(one).all()
        scale = max(float(other.abs().max()), 1.0)  # a gradient may cancel out
        assert float((one - other).abs().max()) <= tolerance * scale
