"""What reaches a raw pointer: the same numbers as plain torch whatever torch's defaults are and whatever a tensor is
made of.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.utils.prune
from norm_cases import CASES, C, assert_all_close, batch, make, train

from fairseq_powernorm import kernels


@contextlib.contextmanager
def defaults(dtype=None, device=None):
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


TRITON = pytest.param("triton", "power", "algorithm2", marks=pytest.mark.slow)
#: backend, norm, variant. Triton's interpreter takes a second for each: one norm, of those that it is made for
each_norm = pytest.mark.parametrize(
    "kernel, name, variant", [*((kernel, *case) for kernel in ("eager", "c") for case in CASES), TRITON],
    indirect=["kernel"],
)  # fmt: skip


@pytest.fixture(params=["eager", "c", pytest.param("triton", marks=pytest.mark.slow)])
def kernel(request):
    """Each backend in turn; Triton's in its interpreter."""
    backend = kernels.KERNELS[request.param]
    if backend.unavailable() or (request.param == "triton" and torch.cuda.is_available()):
        pytest.skip(backend.unavailable() or "a GPU's Triton does not work on the CPU")
    with kernels.only(request.param):
        yield request.param


@functools.lru_cache(maxsize=None)
def plain(kernel, name, variant, dtype=torch.float32):
    """What an ordinary norm computes with ordinary tensors by the kernel that is in use."""
    return train(make(name, variant), dtype=dtype)


@pytest.mark.parametrize(
    "dtype, device", [(torch.float64, None), (torch.bfloat16, None), (torch.float16, None), (None, "meta")]
)
@each_norm
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_defaults_of_torch_change_no_number(kernel, name, variant, dtype, device, input_dtype):
    """A norm used under another default dtype or device computes, bit for bit, what it computes without."""
    expected = plain(kernel, name, variant, input_dtype)
    norm = make(name, variant)
    with defaults(dtype, device):
        found = train(norm, dtype=input_dtype)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def lazy_zero(dy):
    return torch._efficientzerotensor(dy.shape, dtype=dy.dtype)


GRADIENTS = {
    "zero": (lazy_zero, torch.zeros_like),
    "expanded": (lambda dy: dy[:1, :1, :1].expand(dy.shape), lambda dy: dy[:1, :1, :1].repeat(*dy.shape)),
    "transposed": (lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1), lambda dy: dy),
    "negative view": (lambda dy: torch._neg_view(-dy), lambda dy: dy),
    "subclass": (lambda dy: dy.as_subclass(Sub), lambda dy: dy),
    "channels apart": (lambda dy: torch.stack([dy, dy], -1)[..., 0], lambda dy: dy),
}


class Sub(torch.Tensor):
    """A subclass without behaviour of its own."""


@pytest.mark.parametrize("kind", GRADIENTS)
@each_norm
def test_gradients_of_any_make(kernel, name, variant, kind):
    """A gradient that is lazy, strided or of a subclass gives what its dense copy gives."""
    make_dy, dense = GRADIENTS[kind]
    if kind == "zero":  # torch's engine asks it to be of the output's kind, as a custom function may return it
        make_dy = lazy_zero
    assert_all_close(train(make(name, variant), make_dy=make_dy), train(make(name, variant), make_dy=lambda dy: dense(dy)))


INPUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "negative view": lambda x: torch._neg_view(-x),
    "offset": lambda x: torch.cat([x, x])[5:],
    "subclass": lambda x: x.as_subclass(Sub),
}


@pytest.mark.parametrize("kind", INPUTS)
@each_norm
def test_inputs_of_any_make(kernel, name, variant, kind):
    """The same for the input."""
    assert_all_close(train(make(name, variant), make_x=INPUTS[kind]), plain(kernel, name, variant))


def in_column(value):
    table = torch.full((*value.shape, 3), 7.0, dtype=value.dtype)
    table[..., 0] = value
    return table[..., 0], lambda: bool((table[..., 1:] == 7.0).all())


def in_row(value):
    table = torch.full((3, *value.shape), 7.0, dtype=value.dtype)
    table[1] = value
    return table[1], lambda: bool((table[[0, 2]] == 7.0).all())


def in_wider(value):
    return value.double(), lambda: True


def as_subclass(value):
    return value.clone().as_subclass(Sub), lambda: True


def from_inference(value):
    with torch.inference_mode():
        return value.clone(), lambda: True


@pytest.mark.parametrize("place", [in_column, in_row, in_wider, as_subclass, from_inference])
@each_norm
def test_statistics_in_memory_of_others(kernel, name, variant, place):
    """A statistic that is a part of another tensor, or of another kind, takes its steps, and nothing beside it changes."""
    expected = plain(kernel, name, variant)
    for buffer in dict(make(name, variant).named_buffers()):
        norm = make(name, variant)
        value, untouched = place(getattr(norm, buffer))
        setattr(norm, buffer, value)
        assert_all_close(train(norm), expected)
        assert untouched()


@pytest.mark.parametrize("place", [in_column, in_row, in_wider, as_subclass])
@each_norm
def test_parameters_in_memory_of_others(kernel, name, variant, place):
    """The same for weight and bias."""
    expected = plain(kernel, name, variant)
    norm = make(name, variant)
    for parameter in ("weight", "bias"):
        value, untouched = place(getattr(norm, parameter).detach())
        if place is as_subclass:
            value = torch.nn.Parameter(value.as_subclass(torch.Tensor))
        setattr(norm, parameter, torch.nn.Parameter(value))
    assert_all_close(train(norm), expected)
    assert untouched()


def test_memory_that_was_released_is_not_read(kernel):
    """Sharding frees storages: a parameter, input or mask without its memory is an error, not a read of somebody else's."""
    for what in ("weight", "x", "running_phi"):
        norm = make("power", "algorithm2").eval()
        x, _, _ = batch()
        victim = x if what == "x" else getattr(norm, what).data if what == "weight" else getattr(norm, what)
        victim.untyped_storage().resize_(0)
        assert kernels.choose(x, norm.weight, norm.running_phi) is kernels.eager


def test_wrong_sizes_are_refused(kernel):
    """A vector or mask of another size is a ValueError in every pass."""
    norm = make("power", "algorithm2")
    norm.running_phi = torch.ones(1)
    for mode in (True, False):
        with pytest.raises(ValueError, match=f"expected {C} values"):
            norm.train(mode)(batch()[0])


def elsewhere(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


HOOKS = {
    "on the cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "strided": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, elsewhere),
    "double": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.double() if t.is_floating_point() else t, lambda t: t
    ),
    "subclass": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.as_subclass(Sub)),
}


@pytest.mark.parametrize("hooks", HOOKS)
@each_norm
def test_saved_tensors_that_come_back_otherwise(kernel, name, variant, hooks):
    """Hooks on saved tensors give back other memory, another layout or dtype: the same gradients and statistics."""
    expected = plain(kernel, name, variant)
    with HOOKS[hooks]():
        found = train(make(name, variant))
    assert_all_close(found, expected)


@each_norm
def test_parametrized_weights(kernel, name, variant):
    """A weight that is computed (parametrizations, pruning) is as good as a parameter."""

    class Absolute(torch.nn.Module):
        def forward(self, weight):
            return weight.abs()

    norm = make(name, variant)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Absolute())
    pruned = make(name, variant)
    torch.nn.utils.prune.custom_from_mask(pruned, "weight", torch.ones(C))
    for each in (norm, pruned):
        assert_all_close(train(each)[:7], plain(kernel, name, variant)[:7])
