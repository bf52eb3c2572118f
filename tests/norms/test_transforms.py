"""What torch does around a module: function transforms, forward-mode derivatives, fake tensors, export, scripting,
compiling.
"""

import copy
import io

import pytest
import torch
from norm_cases import ALL, APPROXIMATE, CASES, C, assert_all_close, batch, make, new
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.kernels.interface import StepSpec
from fairseq_powernorm.norms import penalty
from fairseq_powernorm.operators import OpaqueSpec
from fairseq_powernorm.statistics import RunningStatistics

EXACT = [case for case in CASES if case[0] not in APPROXIMATE]


def derivative(norm, x, dy):
    leaf = x.clone().requires_grad_()
    norm(leaf).backward(dy)
    return leaf.grad


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name, variant", ALL)
def test_transforms_in_evaluation(name, variant, frozen):
    """grad, vjp, jvp, jacrev, jacfwd, vmap and forward-mode duals agree with ordinary autograd."""
    norm = make(name, variant).eval().requires_grad_(not frozen)
    x, dy, _ = batch()
    expected = derivative(norm, x, dy)
    assert_all_close(
        [grad(lambda x: (norm(x) * dy).sum())(x), vjp(norm, x)[1](dy)[0], jacrev(lambda x: (norm(x) * dy).sum())(x)],
        [expected] * 3,
    )
    y, tangent = jvp(norm, (x,), (dy,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, dy)))
        assert dual.tangent is not None
        found = dual.tangent
    direction = (jacfwd(norm)(x[:1, :1]) * dy[:1, :1]).sum((3, 4, 5))
    assert_all_close([y, tangent, tangent[:1, :1]], [norm(x), found, direction])
    assert_all_close([(tangent * dy).sum()], [(derivative(norm, x, dy) * dy).sum()], 1e-5)  # <J v, v> = <v, J^T v>
    assert_all_close([vmap(norm)(torch.stack([x, 2 * x]))], [torch.stack([norm(x), norm(2 * x)])])
    per_example = vmap(grad(lambda x: norm(x[None]).square().sum()))(x[0])
    assert_all_close([per_example], [grad(lambda x: norm(x).square().sum())(x[0])])


@pytest.mark.parametrize("name, variant", ALL)
def test_second_derivatives_in_evaluation(name, variant):
    """gradgradcheck of the evaluation, a row of zeros among the others."""
    if name == "ada":
        pytest.skip("a part of its output has no gradient: what comes back is no function's derivative")
    norm = make(name, variant, torch.float64).eval()
    x = batch(0, torch.float64)[0][:2, :1]
    x[0] = 0.0
    assert torch.autograd.gradgradcheck(norm, (x.requires_grad_(),))


@pytest.mark.parametrize("name, variant", ALL)
def test_several_gradients_at_once_in_evaluation(name, variant):
    """is_grads_batched, as jacobian(vectorize=True) uses it, gives each gradient."""
    norm = make(name, variant).eval()
    x, dy, _ = batch()
    x.requires_grad_()
    (found,) = torch.autograd.grad(norm(x), x, torch.stack([dy, 2 * dy]), is_grads_batched=True)
    expected = derivative(norm, x.detach(), dy)
    assert_all_close([found], [torch.stack([expected, 2 * expected])])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("name, variant", ALL)
def test_func_grad_in_training(name, variant, captured):
    """torch.func.grad over a training pass: gradients and every step of the statistics, parameters and buffers
    captured or given.
    """
    norm, plain = make(name, variant, warmup_updates=2), make(name, variant, warmup_updates=2)
    for step in range(4):
        x, dy, mask = batch(step)
        leaf = x.clone().requires_grad_()
        (plain(leaf, mask) * dy).sum().backward()
        parameters, buffers = dict(norm.named_parameters()), dict(norm.named_buffers())

        def loss(x, parameters, buffers):
            return ((norm(x, mask) if captured else functional_call(norm, (parameters, buffers), (x, mask))) * dy).sum()

        found = grad(loss, argnums=(0,) if captured else (0, 1))(x, parameters, buffers)
        assert_all_close([found[0], *norm.buffers()], [leaf.grad, *plain.buffers()])
        if not captured:
            assert_all_close(found[1].values(), [p.grad for p in plain.parameters()])
        plain.zero_grad()


@pytest.mark.parametrize("name, variant", CASES)
def test_given_buffers_take_the_steps(name, variant):
    """Those of ``functional_call``, also in a backward pass after it; the norm's own stay as they are."""
    norm, plain = make(name, variant), make(name, variant)
    own = {key: value.clone() for key, value in norm.named_buffers()}
    given = {key: value.clone() for key, value in own.items()}
    for step in range(3):
        x, dy, mask = batch(step)
        functional_call(norm, given, (x.requires_grad_(), mask)).backward(dy)
        plain(x, mask).backward(dy)
    for key, value in plain.named_buffers():
        assert torch.equal(given[key], value), key
        assert torch.equal(norm.get_buffer(key), own[key]), key


@pytest.mark.parametrize("name, variant", EXACT)
def test_forward_derivatives_in_training(name, variant):
    """jvp of the norms with an exact gradient is its transpose; PN's approximate gradient has none and says so."""
    x, dy, mask = batch(0, torch.float64)
    norm, other = (make(name, variant, torch.float64) for _ in range(2))
    _, tangent = jvp(lambda x: norm(x, mask), (x,), (dy,))
    leaf = x.clone().requires_grad_()
    other(leaf, mask).backward(dy)
    torch.testing.assert_close((tangent * dy).sum(), (leaf.grad * dy).sum())


@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_what_has_no_meaning_for_the_approximate_gradient_is_refused(variant):
    """Forward derivatives, second derivatives and several gradients at once through PN in training."""
    norm = make("power", variant)
    x, dy, _ = batch()
    with pytest.raises(Exception, match="(?i)forward mode|jvp|forward AD"):
        jvp(norm, (x,), (dy,))
    with forward_ad.dual_level(), pytest.raises(Exception, match="(?i)forward mode|jvp|forward AD"):
        norm(forward_ad.make_dual(x, dy))
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="several gradients at once"):
        torch.autograd.grad(norm(leaf), leaf, torch.stack([dy, dy]), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="can't be differentiated"):
        torch.autograd.grad(norm(leaf), leaf, dy, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("name, variant", CASES)
def test_vmap_in_training_is_refused(name, variant):
    """Each example would take a step; the statistics stay as they were."""
    norm = make(name, variant)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 5, 3, C)
    for f in (norm, grad(lambda x: norm(x).sum())):
        with pytest.raises(RuntimeError, match="vmap over a .* in training"):
            vmap(f)(x)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name, variant", EXACT)
def test_second_derivatives_in_training(name, variant):
    """gradcheck and gradgradcheck with a mask, valid rows and padding, one of them zeros."""
    norm = make(name, variant, torch.float64, dim=4)
    x, _, mask = batch(0, torch.float64)
    x, mask = x[1:4, :2, :4].clone(), mask[:2, 1:4]
    x[2, 1] = 0.0
    assert mask[1, 2]
    x.requires_grad_()

    def function(x):
        state = {key: buffer.clone() for key, buffer in norm.named_buffers()}  # which takes the step of each call
        return functional_call(norm, state, (x, mask))

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-4)


# ---------------------------------------------------------------- without values


@pytest.mark.parametrize("name, variant", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_fake_and_meta_tensors(name, variant, training):
    """Shapes and dtypes of output and gradients without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16):
        norm = make(name, variant).to("meta").train(training)
        x = torch.empty(5, 3, C, dtype=dtype, device="meta", requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.is_meta and y.shape == x.shape and y.dtype == x.grad.dtype == dtype
        assert all(p.grad.shape == p.shape for p in norm.parameters())
        with FakeTensorMode():
            norm = new(name, variant).train(training)
            x = torch.empty(5, 3, C, dtype=dtype, requires_grad=True)
            y = norm(x, torch.zeros(3, 5, dtype=torch.bool))
            y.sum().backward()
            assert type(y).__name__ == "FakeTensor" and y.shape == x.shape and y.dtype == x.grad.dtype == dtype


# ---------------------------------------------------------------- export, scripting


def export_for_any_length(module, x):
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("time", min=2, max=100)},))


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", ALL)
def test_export_of_the_evaluation(name, variant):
    """torch.export gives a graph of torch's own operations with the same numbers, for any number of rows."""
    norm = make(name, variant).eval()
    x, _, _ = batch()
    if name == "rms":
        try:
            export_for_any_length(nn.RMSNorm(C), x)
        except torch._dynamo.exc.UserError:
            pytest.skip("torch's own RMSNorm is exported for one length only, as in torch 2.4")
    program = export_for_any_length(norm, x)
    assert not [node for node in program.graph.nodes if "fairseq_powernorm" in str(node.target)]
    for each in (x, torch.randn(9, 3, C)):
        assert_all_close([program.module()(each)], [norm(each)])


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", CASES)
def test_export_of_training(name, variant):
    """torch.export of a training norm: the exported module takes the same steps of the statistics."""
    without_penalty = dict(p_mean=0.0, p_var=0.0) if name == "rbn" else {}
    norm, plain = (make(name, variant, **without_penalty) for _ in range(2))
    x, _, mask = batch()
    module = torch.export.export(norm, (x, mask)).module()
    for step in range(3):
        x, _, mask = batch(step)
        with torch.no_grad():
            assert_all_close([module(x, mask)], [plain(x, mask)])
    exported, expected = dict(module.named_buffers()), dict(plain.named_buffers())
    assert set(norm.STEPS["forward"]) <= set(exported) <= set(expected)  # torch 2.4 leaves out those that are not used
    assert_all_close([exported[name] for name in sorted(exported)], [expected[name] for name in sorted(exported)])


@pytest.mark.parametrize("dtype, groups", [(torch.float32, 0), (torch.bfloat16, 1), (torch.float64, 2)])
@pytest.mark.parametrize("name, variant", ALL)
def test_scripting_a_bare_norm(name, variant, dtype, groups):
    """torch.jit.script in evaluation, alone and inside a model: the same numbers; in training it is refused."""
    if name == "layer" and dtype is torch.float64:
        pytest.skip("torch's own takes no float64 input with float32 parameters")
    norm = make(name, variant, groups=groups).eval()
    x = batch(0, dtype)[0]
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 2e-6}[dtype]
    for module in (norm, nn.Sequential(norm)):
        assert_all_close([torch.jit.script(module)(x)], [norm(x)], tolerance)
    if name in dict(CASES):
        with pytest.raises(RuntimeError, match=r"in training: call eval\(\) first"):
            torch.jit.script(norm.train())


@pytest.mark.parametrize("name, variant", CASES)
def test_a_model_that_was_scripted_is_not_trained_without_its_norms(name, variant):
    """torch.jit.script changes the model that it is given: training that goes on with it is refused, a copy's is not."""
    model = nn.Sequential(make(name, variant)).eval()
    torch.jit.script(copy.deepcopy(model))
    model.train()(batch()[0])
    assert model[0].iters == 1
    scripted = torch.jit.script(model.eval())
    with pytest.raises(RuntimeError, match=r"script copy.deepcopy\(model\)"):
        model.train()
    scripted.train()(batch()[0])


@pytest.mark.parametrize("name, variant", ALL)
def test_tracing(name, variant):
    """torch.jit.trace in evaluation; in training a norm with statistics refuses it."""
    norm = make(name, variant).eval()
    x, _, _ = batch()
    assert_all_close([torch.jit.trace(norm, x)(2 * x)], [norm(2 * x)])
    if name in dict(CASES):
        with pytest.raises(RuntimeError, match=r"in training: call eval\(\) first"):
            torch.jit.trace(norm.train(), x)


@pytest.mark.parametrize("layout", ["time_first", "channels_first"])
@pytest.mark.parametrize("name", ["rms", "power", "batch"])
def test_onnx(name, layout):
    """torch's exporter by tracing, of a norm and of what is left of it when folded: the same numbers for other sizes."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    norm = make(name, layout=layout).eval()
    rows, channels = {"time_first": ((0, 1), 2), "channels_first": ((0, 2), 1)}[layout]
    axes = {"x": {rows[0]: "one", rows[1]: "other"}}
    x, other = (each[0].movedim(2, channels).contiguous() for each in (batch(), batch(1)))
    for module in (norm, fold_norms(nn.Sequential(copy.deepcopy(norm)))):
        stream = io.BytesIO()
        torch.onnx.export(module, (x,), stream, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
        session = runtime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": other[:2].numpy()})
        assert_all_close([torch.from_numpy(found)], [norm(other[:2])])


# ---------------------------------------------------------------- torch.compile


class Model(nn.Module):
    """A norm between linear maps, with something after it that a compiler fuses."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm, self.second = nn.Linear(C, C), norm, nn.Linear(C, C)

    def forward(self, x, mask):
        return self.second(torch.relu_(self.norm(self.first(x), mask))) + x


def steps_of(model, f, staged=False, steps=5, scale=4.0):
    statistics = RunningStatistics(model) if staged else None
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2 if staged else 1):
            x, dy, mask = batch(10 * step + part)
            x.requires_grad_()
            if staged:
                with statistics.batch(gradient_scale=scale):
                    (((f(x, mask) * dy).sum() + penalty(model)) * scale).backward()
            else:
                ((f(x, mask) * dy).sum() + penalty(model)).backward()
            found.append(x.grad)
        optimizer.step()
        if staged:
            statistics.commit()
    model.eval()
    found.append(f(x.detach(), mask).detach())
    return found + [value.detach() for value in model.state_dict().values()]


#: norms that give their sums to a stage in ways of their own: by operators, with windows, with a penalty
STAGED = [("power", "reference"), ("un", None), ("rbn", None)]
#: the other norms without statistics are compiled by test_row_norms.py
COMPILED = [(*case, False) for case in (*CASES, ("layer", None), ("rms", None))] + [(*case, True) for case in STAGED]


@pytest.mark.slow
@pytest.mark.parametrize("name, variant, staged", COMPILED)
def test_compiled_training_and_evaluation(name, variant, staged):
    """torch.compile(fullgraph=True): five steps of training across the end of the warm-up, then evaluation, as without."""
    torch._dynamo.reset()  # the norms share code, which is compiled a limited number of times
    results = []
    for compiled in (False, True):
        model = Model(make(name, variant, warmup_updates=3))
        f = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append(steps_of(model, f, staged))
    assert_all_close(*results, 1e-5)


@pytest.mark.parametrize("name, variant", STAGED)
def test_compiled_with_the_scale_of_a_gradient_scaler(name, variant):
    """A ``gradient_scale`` that is a tensor, as the integrations give it in fp16 training: as without compiling."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = Model(make(name, variant, warmup_updates=1))
        f = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append(steps_of(model, f, staged=True, steps=3, scale=torch.tensor(1024.0)))
    assert_all_close(*results, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", [("power", "reference"), ("power", "algorithm2")])
def test_compiled_by_inductor(name, variant):
    """The same with torch's own compiler."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = Model(make(name, variant, warmup_updates=3))
        results.append(steps_of(model, torch.compile(model, fullgraph=True) if compiled else model))
    assert_all_close(*results, 1e-5)


@pytest.mark.slow
def test_compiled_checkpointing_is_exact_or_refused():
    """With RunningStatistics a compiled segment may be recomputed; a norm that steps by itself says that it may not."""
    torch._dynamo.reset()

    def f(model):
        return lambda x, mask: torch.utils.checkpoint.checkpoint(model, x, mask, use_reentrant=False)

    plain, compiled = (Model(make("power", "reference", warmup_updates=3)) for _ in range(2))
    expected = steps_of(plain, plain, staged=True)
    found = steps_of(compiled, torch.compile(f(compiled), fullgraph=True, backend="aot_eager"), staged=True)
    assert_all_close(found, expected, 1e-5)
    torch._dynamo.reset()
    alone = Model(make("power", "reference", warmup_updates=3))
    with pytest.raises(Exception, match="activation checkpointing inside torch.compile"):
        steps_of(alone, torch.compile(f(alone), fullgraph=True, backend="aot_eager"))


# ---------------------------------------------------------------- the operators themselves


@pytest.mark.parametrize("dtype, groups", [(torch.float64, 0), (torch.float32, 2), (torch.bfloat16, 2)])
def test_operators_are_what_they_declare(dtype, groups):
    """torch.library.opcheck: schemas, mutations, fake results, autograd registration."""
    norm = make("power", "algorithm2", groups=groups)
    x, dy, _ = batch(0, dtype)
    valid = torch.ones(15, dtype=torch.bool)
    spec = OpaqueSpec(
        groups=groups, eps=1e-5, nu_scale=0.1, gradient_scale=1.0, warmup=0, trusted_after=1, batch_statistics=False,
        backward_batch=False, skip_padding=True, own_step=True, jump=100.0,
    )  # fmt: skip
    step = StepSpec(alpha_fwd=0.9, nu_scale=0.1, eps=1e-5, warmup=0, trusted_after=1, jump=100.0, nu_lowest=-1.0)
    ops = torch.ops.fairseq_powernorm
    arguments = (x, norm.weight.detach(), norm.bias.detach(), valid, norm.running_phi, norm.iters, *spec)
    _, r, saved, tally = ops.forward(*arguments)
    torch.library.opcheck(ops.forward, arguments)
    for scale in (torch.tensor(8.0), None):
        arguments = (dy, x, r, norm.weight.detach(), valid, saved, norm.ema_gz, scale, *spec)
        torch.library.opcheck(ops.backward, arguments)
    torch.library.opcheck(ops.advance_forward_, (tally, norm.running_phi, norm.iters, *step))
    torch.library.opcheck(ops.advance_backward_, (ops.backward(*arguments)[3], norm.ema_gz, *step))
