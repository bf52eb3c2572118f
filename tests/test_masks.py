"""Padding masks for models that know nothing of them: ``padding_mask`` and ``attach_mask``."""
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.masks import attach_mask, padding_mask
from fairseq_powernorm.norms import NORMS, PowerNorm, RunningNorm, build_norm

C, B, T = 8, 3, 6
RUNNING = [
    name + "".join(f":{option}=4" for option in getattr(kind, "REQUIRED", {}))
    for name, kind in NORMS.items()
    if issubclass(kind, RunningNorm)
]


class Layer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = build_norm(norm, C, batch_first=True), nn.Linear(C, C)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


class Model(nn.Module):
    """Layers that are called without a mask, computed again in the backward pass if ``repeat`` says how."""

    def __init__(self, norm="power:variant=algorithm2", repeat=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(norm) for _ in range(2))
        self.repeat = repeat

    def forward(self, x, attention_mask=None, *, keys=None):
        for layer in self.layers:
            if self.repeat is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.repeat == "reentrant")
        return x

    @property
    def norms(self):
        return [layer.norm for layer in self.layers]


def batch(seed=0, length=T):
    """x, and which positions are tokens: at least one of each sentence."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.rand(B, length, generator=draw) < 0.6
    tokens[:, 0] = True
    return torch.randn(B, length, C, generator=draw).requires_grad_(), tokens


def state(model):
    return [each.clone() for each in (*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None))]


def by_hand(model, batches):
    """Buffers and gradients after training steps in which each norm is given its mask by an argument."""
    for x, tokens in batches:
        for layer in model.layers:
            x = x + layer.linear(layer.norm(x, ~tokens)).tanh()
        loss = x[tokens].square().sum()
        loss.backward()
    return state(model)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


KINDS = {
    "bool": (1, lambda tokens: tokens),
    "int": (1, lambda tokens: tokens.long()),
    "float": (1, lambda tokens: tokens.float()),
    "half": (1, lambda tokens: tokens.half()),
    "bool, 0 = valid": (0, lambda tokens: ~tokens),
    "int, 0 = valid": (0, lambda tokens: (~tokens).int()),
    "float, 0 = valid": (0, lambda tokens: (~tokens).float()),
    "segments": (1, lambda tokens: tokens.long() * 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", RUNNING)
def test_a_mask_of_each_call(norm, kind):
    """Read from the argument, whatever marks padding in it, the mask gives what it gives as an argument of each norm."""
    valid, convert = KINDS[kind]
    batches = [batch(seed) for seed in range(3)]
    model = Model(norm)
    attach_mask(model, valid=valid)
    for x, tokens in batches:
        model(x, attention_mask=convert(tokens))[tokens].square().sum().backward()
    assert_same(state(model), by_hand(Model(norm), batches))


@pytest.mark.parametrize("repeat", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("how", ["attach", "context", "both"])
@pytest.mark.parametrize("norm", [*RUNNING, "power"])
def test_computed_again(norm, how, repeat):
    """Under activation checkpointing, backward passes after both forward passes: each has its own call's mask, the inner
    one of two."""
    batches = [batch(seed) for seed in range(2)]
    model, expected = Model(norm, repeat), Model(norm)
    if how != "context":
        attach_mask(model)
    found = []
    for each in (model, expected):
        losses = []
        for x, tokens in batches:
            if each is expected:
                for layer in each.layers:
                    x = x + layer.linear(layer.norm(x, ~tokens)).tanh()
            elif how == "both":
                with padding_mask(each, tokens):  # the opposite
                    x = each(x * 1.0, tokens.long())
            elif how == "attach":
                x = each(x, tokens.long())
            else:
                with padding_mask(each, ~tokens):
                    x = each(x)
            losses.append(x[tokens].square().sum())
        for loss in losses:
            loss.backward()
        found.append(state(each))
    assert_same(*found)


@pytest.mark.parametrize("repeat", ["reentrant", "non-reentrant"])
def test_calls_without_a_mask_are_computed_again_without_one(repeat):
    """Between calls with masks, one without: its backward pass sees none."""
    torch.manual_seed(1)
    model, expected = Model("batch", repeat), Model("batch")
    attach_mask(model)
    (x, tokens), (plain, _) = batch(0), batch(1)
    outputs = [model(x, tokens), model(plain), model(x, tokens)]
    sum(y.square().sum() for y in outputs[:2]).backward()
    attach_mask(expected)
    outputs = [expected(x, tokens), expected(plain), expected(x, tokens)]
    sum(y.square().sum() for y in outputs[:2]).backward()
    assert_same(state(model), state(expected))


class Threads:
    """Runs functions in a thread each, one after the other in turns that they take at barriers."""

    def __init__(self, *functions):
        self.errors = []

        def run(function):
            try:
                function()
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=run, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def test_threads():
    """Two threads that call one model at the same time see their own masks: rows are counted as one after the other."""
    model = Model("power-v:alpha_fwd=1.0")
    attach_mask(model)
    seen, together = {}, threading.Barrier(2)
    first = model.layers[0].norm

    def call(number):
        x, tokens = batch(number, length=T + number)  # a mask of the other thread would not fit

        def forward():
            together.wait(timeout=60)
            seen[number] = model(x, tokens)
            together.wait(timeout=60)

        return forward

    Threads(call(0), call(1))
    for number in (0, 1):
        x, tokens = batch(number, length=T + number)
        alone = Model("power-v:alpha_fwd=1.0")
        attach_mask(alone)
        torch.testing.assert_close(seen[number], alone(x, tokens))
    assert float(first.iters) == 2


def test_threads_that_compute_again():
    """Step for step new threads, as data parallelism has them: each repetition finds the mask of its step."""
    model, expected = Model("batch", "non-reentrant"), Model("batch")
    handle = attach_mask(model)
    for step in range(3):
        x, tokens = batch(step)
        output = []
        Threads(lambda x=x, tokens=tokens, output=output: output.append(model(x, tokens)))
        output.pop()[tokens].square().sum().backward()
    handle.remove()
    assert_same(state(model), by_hand(expected, [batch(step) for step in range(3)]))


def test_threads_that_nothing_tells_apart():
    """Two calls in two threads whose graphs are alive: an error, not the mask of the wrong one."""
    model = Model("batch", "non-reentrant")
    attach_mask(model)
    outputs = []
    for step in range(2):
        x, tokens = batch(step)
        Threads(lambda x=x, tokens=tokens: outputs.append(model(x, tokens)))
    with pytest.raises(RuntimeError, match="several threads on one device"):
        outputs[0].sum().backward()


def test_threads_of_which_one_is_gone():
    """Two calls in two threads, the output of one thrown away: the other is the only one that can be computed again."""
    for gone in (0, 1):
        model, batches, outputs = Model("batch", "non-reentrant"), [batch(0), batch(1)], []
        attach_mask(model)
        for x, tokens in batches:
            Threads(lambda x=x, tokens=tokens: outputs.append(model(x, tokens)))
        del outputs[gone]
        x, tokens = batches[1 - gone]
        outputs[0][tokens].square().sum().backward()
        expected = Model("batch")
        for number, (x, tokens) in enumerate(batches):
            y = x
            for layer in expected.layers:
                y = y + layer.linear(layer.norm(y, ~tokens)).tanh()
            if number != gone:
                y[tokens].square().sum().backward()
        assert_same(state(model), state(expected))


def test_nested():
    """A context around a call counts where the call has no mask, an inner module's mask within it, and both end."""
    model = Model("power-v:alpha_fwd=0.0")
    attach_mask(model)
    x, tokens = batch()
    other = tokens.clone()
    other[:, -1] = ~other[:, -1]

    def rows(call):
        before = [norm.running_phi.clone() for norm in model.norms]
        call()
        found = model.norms[0].running_phi.clone()
        for norm, value in zip(model.norms, before):
            norm.running_phi.copy_(value)
        return found

    def of(mask):
        norm = build_norm("power-v:alpha_fwd=0.0", C, batch_first=True)
        norm(x, mask)
        return norm.running_phi

    def within(mask, **arguments):
        with padding_mask(model, mask):
            model(x, **arguments)

    assert torch.equal(rows(lambda: within(~tokens)), of(~tokens))
    assert torch.equal(rows(lambda: within(~tokens, attention_mask=other)), of(~other))
    assert torch.equal(rows(lambda: model(x, other)), of(~other))
    assert torch.equal(rows(lambda: model(x)), of(None))
    with padding_mask(model.layers[0], ~tokens):
        assert torch.equal(rows(lambda: model(x)), of(~tokens))
    with pytest.raises(ValueError, match="expected"), padding_mask(model, torch.zeros(2, 2, dtype=torch.bool)):
        model(x)
    assert torch.equal(rows(lambda: model(x)), of(None))


def test_an_error_in_the_call_ends_it():
    """After a call that failed, the next one has no mask."""
    model = Model("batch")
    attach_mask(model)
    x, tokens = batch()
    with pytest.raises(TypeError):
        model(x, tokens, keys=1, values=2)
    with pytest.raises(ValueError, match="expected"):
        model(x[..., :-1], tokens)
    with pytest.raises(ValueError, match="B x T"):
        model(x, tokens[None, None])
    model(x[:1, :2])


def test_evaluation_looks_at_no_mask():
    """In evaluation a mask of any length will do, as in generation with a cache; it changes nothing."""
    for norm in (*RUNNING, "batch:variant=reference"):
        model = Model(norm).eval()
        x, _ = batch()
        expected = model(x)
        attach_mask(model)
        assert torch.equal(model(x, torch.ones(B, T + 4)), expected)
        assert torch.equal(model(x[:, :1], torch.ones(B, 1, T, T)), model(x[:, :1]))


@pytest.mark.parametrize("repeat", [None, "reentrant", "non-reentrant"])
def test_a_mask_that_is_written_anew(repeat):
    """One tensor holds the mask of each call in turn: each call, and its repetition, has what stood there when it began."""
    model, buffer = Model("batch", repeat), torch.empty(B, T, dtype=torch.bool)
    batches = [batch(seed) for seed in range(3)]
    for x, tokens in batches:
        buffer.copy_(~tokens)
        with padding_mask(model, buffer):
            y = model(x)
        buffer.fill_(True)
        y[tokens].square().sum().backward()
    assert_same(state(model), by_hand(Model("batch"), batches))


def test_frozen_norms():
    """Training norms in a model in evaluation, and the other way round: those in training have the mask."""
    x, tokens = batch()
    model = Model("power-v:alpha_fwd=0.0").eval()
    attach_mask(model)
    model.layers[0].norm.train()
    model(x, tokens)
    norm = build_norm("power-v:alpha_fwd=0.0", C, batch_first=True)
    norm(x, ~tokens)
    assert torch.equal(model.layers[0].norm.running_phi, norm.running_phi)
    assert float(model.layers[1].norm.iters) == 0


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(way):
    """A copied model reads its own calls; taking off the original's mask leaves the copy its own."""
    model = Model("batch")
    handle = attach_mask(model)
    twin = way(model)
    handle.remove()
    handle.remove()
    batches = [batch(seed) for seed in range(2)]
    for x, tokens in batches:
        twin(x, tokens)[tokens].square().sum().backward()
    assert_same(state(twin), by_hand(Model("batch"), batches))
    assert all(norm.mask_slot is None for norm in model.norms) and not model._forward_hooks and not model._forward_pre_hooks
    model(batch()[0], torch.ones(2, 2, 2, 2))


@pytest.mark.parametrize("layout", ["batch_first", "time_first"])
def test_rows_strung_together(layout):
    """A layer that makes ``N x C`` of its rows takes the mask in the order of its norm's layout."""
    model = Model("batch")
    for norm in model.norms:
        norm.layout = layout
    attach_mask(model)
    x, tokens = batch()
    order, rows = (0, 1) if layout == "batch_first" else (1, 0), []
    model.layers[0].register_forward_pre_hook(lambda layer, args: (args[0].transpose(*order).reshape(-1, C),))
    model.layers[1].norm.register_forward_pre_hook(lambda norm, args: rows.append(args[0]))
    model(x, tokens)
    expected = build_norm("batch", C)
    expected(rows[0], ~tokens.permute(*order).reshape(-1))
    assert torch.equal(model.norms[1].running_mean, expected.running_mean)


def test_a_part_is_copied():
    """A copy of a part takes no copy of the model along; in its place it has the model's masks, elsewhere it is free."""
    model = Model("batch")
    attach_mask(model)
    twin, (x, tokens) = copy.deepcopy(model.layers[1]), batch()
    assert len(pickle.dumps(twin)) < 2 * len(pickle.dumps(Layer("batch")))
    model.layers[1] = twin
    model(x, tokens)[tokens].square().sum().backward()
    assert_same(state(model), by_hand(Model("batch"), [(x, tokens)]))
    free = nn.Sequential(copy.deepcopy(twin))
    attach_mask(free, "input")


def test_a_part_that_is_copied_first():
    """A copy of several modules keeps a mask for a norm of the model that stands elsewhere, too, and is copied before it."""
    model = Model("batch")
    attach_mask(model)
    x, tokens = batch()
    twin = copy.deepcopy(nn.ModuleList([model.norms[0], model]))[1]
    twin(x, tokens)[tokens].square().sum().backward()
    assert_same(state(twin), by_hand(Model("batch"), [(x, tokens)]))
    assert all(float(norm.iters) == 0 for norm in model.norms)


def test_norms_that_are_replaced():
    """A norm that comes in place of another one has its mask, by its own mode, and remove() ends that."""
    model = Model("power")
    handle = attach_mask(model.eval())
    replace_norms(model, "batch", kinds=[PowerNorm])
    x, tokens = batch()
    model.train()(x, tokens)[tokens].square().sum().backward()
    assert_same(state(model), by_hand(Model("batch"), [(x, tokens)]))
    with pytest.raises(ValueError, match="layers.0.norm: padding_mask of shape"):
        model(x, tokens[:, 1:])
    handle.remove()
    assert all(norm.mask_slot is None for norm in model.norms)


def test_a_handle_is_a_context():
    """``with attach_mask(model):`` takes it off at the end; it can be attached again."""
    model = Model()
    for _ in range(2):
        with attach_mask(model):
            assert all(norm.mask_slot is not None for norm in model.norms)
    assert all(norm.mask_slot is None for norm in model.norms)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting():
    """torch.jit.script, which compiles hooks, asks to take the mask off; without it, it computes the same."""
    model = nn.Sequential(PowerNorm(8, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    with attach_mask(model, "input"), pytest.raises(RuntimeError, match=r"attach_mask: remove\(\) that first"):
        torch.jit.script(model)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_norms_that_need_no_mask():
    """A model of norms over single rows takes the same lines, and they change nothing."""
    model = Model("layer")
    expected = model(batch()[0])
    attach_mask(model)
    with padding_mask(model, torch.zeros(1, 1, dtype=torch.bool)):
        assert torch.equal(model(batch()[0], torch.ones(B, T)), expected)


def test_parts_with_masks_of_their_own():
    """An encoder and a decoder, each with its mask; the model's own norm between them sees none."""
    model = nn.ModuleDict(dict(encoder=Model("batch"), decoder=Model("batch"), norm=build_norm("batch", C)))
    attach_mask(model["encoder"])
    attach_mask(model["decoder"])
    (x, tokens), (y, others) = batch(0), batch(1, length=T + 3)
    model["norm"](model["encoder"](x, tokens))
    model["decoder"](y, attention_mask=others)
    assert model["norm"].mask_slot is None
    with pytest.raises(ValueError, match="already"):
        attach_mask(nn.ModuleList([model["encoder"]]), "input")


@pytest.mark.slow
def test_compiled():
    """A model that is compiled with its mask attached trains as it does without a compiler, and is compiled once."""
    torch._dynamo.reset()
    batches = [batch(seed) for seed in range(4)]
    model = Model("batch")
    attach_mask(model)
    compiled = torch.compile(model, backend="eager")
    for number, (x, tokens) in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            compiled(x, tokens)[tokens].square().sum().backward()
    assert_same(state(model), by_hand(Model("batch"), batches))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Model()

    def forward(self, *inputs, **kwargs):
        return self.inner(*inputs, **kwargs)


WRONG = {
    "argument": (lambda m: attach_mask(m, "mask"), "argument='mask': forward of Model has none .* x, attention_mask, keys"),
    "wrapper": (lambda m: attach_mask(Wrapper()), "forward of Wrapper has none .* attach the mask to the module whose"),
    "valid": (lambda m: attach_mask(m, valid=2), "valid=2: must be 1 .* or 0"),
    "no norm": (lambda m: attach_mask(nn.Linear(2, 2), "input"), "the Linear has no norm of fairseq_powernorm"),
    "no module": (lambda m: attach_mask(3), "'int' is no module"),
    "twice": (lambda m: [attach_mask(m), attach_mask(m)], "layers.0.norm takes its mask from the argument 'attention_mask'"),
    "3-D": (lambda m: attached(m, torch.ones(B, T, T)), r"float32 of shape \(3, 6, 6\): must be B x T.*padding_mask\(model"),
    "4-D": (lambda m: attached(m, torch.ones(B, 1, T, T, dtype=torch.bool)), r"bool of shape \(3, 1, 6, 6\): must be B x T"),
    "additive": (lambda m: attached(m, torch.full((B, T), -1e9)), "must hold 1 at tokens and 0 at padding; .*numbers < 0"),
    "list": (lambda m: attached(m, [[1] * T] * B), "attention_mask: list: must be a tensor"),
    "length": (lambda m: attached(m, torch.ones(B, T + 1)), r"layers.0.norm: .*\(3, 7\): expected \(3, 6\), B x T.*outside"),
    "context": (lambda m: padding_mask(m, torch.ones(B, T)).__enter__(), "float32 of shape .*: expected bool, True at"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case):
    """An error that names what was given and what is expected."""
    use, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        use(Model())


def attached(model, mask):
    attach_mask(model)
    return model(batch()[0], mask)
