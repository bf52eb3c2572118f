"""Tensorized attention: its definition written as loops, windows of every length, causality, memory."""
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
import toy
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_powernorm.models.tensorized_attention import TensorizedAttention, sinusoids

DIM, RANK, BATCH = 4, 3, 2


def attention(window, cores=1, causal=True, seed=0, **sizes):
    """A small layer in float64, all of its parameters of order 1."""
    torch.manual_seed(seed)
    layer = TensorizedAttention(DIM, window, RANK, cores=cores, causal=causal, **sizes).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def window_of(length, seed=1, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, batch, DIM, generator=generator, dtype=torch.float64, requires_grad=True)


def sinusoid(position):
    """sin and cos of the position at frequencies 10000^(-2m / d), sines first."""
    angles = [position * 10000 ** (-2 * m / DIM) for m in range(DIM // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def by_definition(layer, x):
    """y_i = sum_jk T_ijk W_jk, T averaged over cores, one (i, j) at a time. ``x``: ``T x B x C``, no padding."""
    length = x.size(0)
    u, w = layer.content_bias, layer.position_bias
    q = [layer.q_proj.weight @ x[i].t() for i in range(length)]  # each R x B
    k = [layer.k_proj.weight @ x[i].t() for i in range(length)]
    v = torch.stack([layer.v_proj.weight @ x[i].t() for i in range(length)])
    p = [layer.position_proj.weight @ sinusoid(j) for j in range(length)]
    y = []
    for i in range(length):
        content, position = q[i] + u.unsqueeze(1), q[i] + w.unsqueeze(1)
        seen = i + 1 if layer.causal else length
        total = 0.0
        for j in range(seen):
            at_j = content * k[j] + position * p[j].unsqueeze(1)
            t = (layer.core @ (at_j * v[:seen])).mean(1)  # T_ijk, k x B: sum over r, mean over cores
            total = total + t.t() @ layer.out_weight[j, :seen]
        y.append(total)
    return torch.stack(y)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "window,length,cores",
    [(1, 1, 1), (1, 1, 2), (5, 5, 1), (5, 5, 2), (5, 3, 2), (32, 32, 1), (32, 32, 2), (32, 11, 1)],
)
def test_equals_its_definition(window, length, cores, causal):
    """The blockwise evaluation equals the sums over i, j, k to 1e-10, in whole and shorter windows, with gradients."""
    layer = attention(window, cores, causal)
    x = window_of(length)
    probe = torch.randn(length, BATCH, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    results = []
    for y in (layer(x), by_definition(layer, x)):
        results.append([y, *torch.autograd.grad((y * probe).sum(), wanted)])
    for ours, definition in zip(*results):
        size = definition.detach().abs().max()
        assert size > 1e-3
        assert (ours - definition).abs().max() <= 1e-10 * max(1.0, size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_size_of_a_block_changes_nothing(block, causal):
    """Any number of queries at a time gives the same outputs."""
    x = window_of(10)
    ours, default = attention(10, causal=causal, block=block)(x), attention(10, causal=causal)(x)
    torch.testing.assert_close(ours, default, rtol=1e-12, atol=1e-12)


def test_a_causal_window_continues_a_shorter_one():
    """y of the first n tokens is that of these tokens alone, whatever follows: positions count from the first token."""
    layer, x = attention(12), window_of(12)
    whole = layer(x)
    for length in range(1, 13):
        torch.testing.assert_close(layer(x[:length]), whole[:length], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("garbage", [0.0, 1e3, float("nan")])
def test_padding_on_either_side_is_as_if_absent(causal, garbage):
    """A sentence alone equals the same sentence left- or right-padded within a batch, gradients included."""
    layer = attention(9, causal=causal)
    lengths, total = (4, 7, 9), 9
    sentences = [window_of(n, seed=n, batch=1).detach().requires_grad_() for n in lengths]
    alone = [layer(s)[:, 0] for s in sentences]
    alone_gradient = torch.autograd.grad(sum(y.square().sum() for y in alone), sentences)
    for left in (False, True):
        columns, masks = [], []
        for n, s in zip(lengths, sentences):
            padding = torch.full((total - n, 1, DIM), garbage, dtype=torch.float64)
            columns.append(torch.cat([padding, s] if left else [s, padding]))
            mask = torch.zeros(total, dtype=torch.bool)
            mask[: total - n] = True
            masks.append(mask if left else mask.flip(0))
        mask = torch.stack(masks)
        y = layer(torch.cat(columns, dim=1), mask)
        padded = [y[~mask[b], b] for b in range(len(lengths))]
        for ours, single in zip(padded, alone):
            torch.testing.assert_close(ours, single, rtol=1e-12, atol=1e-12)
        gradient = torch.autograd.grad(sum(y.square().sum() for y in padded), sentences)
        for ours, single in zip(gradient, alone_gradient):
            torch.testing.assert_close(ours, single, rtol=1e-11, atol=1e-11)


def test_counting_positions_from_the_end_is_the_same_model():
    """The sinusoids of L - 1 - j, which the authors' code feeds, are a fixed linear map of those of j."""
    like = torch.zeros((), dtype=torch.float64)
    for length, dim in ((32, 256), (80, 256), (6, 4)):
        ours = sinusoids(length, dim, like)
        ends = length - 1
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        cos, sin = torch.diag((ends * frequencies).cos()), torch.diag((ends * frequencies).sin())
        rotation = torch.cat([torch.cat([-cos, sin]), torch.cat([sin, cos])], dim=1)  # of (sin, cos) of j
        torch.testing.assert_close(ours @ rotation, ours.flip(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [dict(window=0), dict(window=4, cores=0), dict(window=4, block=0)])
def test_sizes_must_be_positive(sizes):
    """A size that is not positive raises ValueError naming it."""
    name = next(name for name, value in sizes.items() if value == 0)
    with pytest.raises(ValueError, match=f"{name}=0: must be positive"):
        attention(**sizes)


def test_longer_windows_are_refused():
    """More tokens than the window holds raise ValueError saying how many it holds."""
    with pytest.raises(ValueError, match="7 tokens.*at most 6"):
        attention(6)(window_of(7))


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation, forward or backward, returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_the_whole_tensor_never_exists(causal):
    """In a training step no tensor has the B L^3 numbers of T, nor more than a block's share of it."""
    length, batch, block = 32, 6, 4
    seen = {}
    for queries in (block, length):
        layer = attention(length, causal=causal, block=queries)
        x = window_of(length, batch=batch)
        with LargestTensor() as largest:
            layer(x).sum().backward()
        seen[queries] = largest.numbers
    assert seen[length] == batch * length**3
    assert seen[block] == batch * block * length**2


def test_what_is_kept_for_the_backward_pass():
    """A forward pass keeps its input and six tensors of B L R numbers, whatever L: the blocks are computed again."""
    length, batch = 32, 6
    layer, x = attention(length), window_of(length, batch=batch)
    kept = {parameter.data_ptr(): 0 for parameter in layer.parameters()}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes() // 8)
        return tensor

    tensors = []  # held, so that no storage is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or keep(t), lambda t: t):
        layer(x)
    assert batch * length * RANK < sum(kept.values()) <= batch * length * (DIM + 7 * RANK)


# ---------------------------------------------------------------- the model


def build(arch="tensorized_lm_pn_ptb", **options):
    sizes = dict(
        decoder_layers=2, decoder_embed_dim=16, decoder_ffn_embed_dim=32, tensorized_window=6, tensorized_rank=3,
        dropout=0.0, activation_dropout=0.0,
    )
    return toy.build(arch, sizes={}, **{**sizes, **options})


def attentions(model):
    return [module for module in model.modules() if isinstance(module, TensorizedAttention)]


def test_the_layers_share_the_biases_and_nothing_else():
    """u and w are one parameter each for all layers, and the rest is each layer's own."""
    model = build(tensorized_cores=2)
    first, second = attentions(model)
    for name, parameter in first.named_parameters():
        assert (parameter is dict(second.named_parameters())[name]) == name.endswith("_bias"), name
    tokens = torch.tensor([[2, 5, 6, 7, 8, 9]])
    model(tokens)[0].sum().backward()
    assert first.content_bias.grad.abs().sum() > 0 and first.position_bias.grad.abs().sum() > 0
    assert "decoder.layers.1.self_attn.content_bias" in model.state_dict()


def test_options_reach_the_attention():
    """Window, rank, cores and causality of the options are those of every layer; causal by default."""
    for layer in attentions(build(tensorized_window=7, tensorized_rank=5, tensorized_cores=3)):
        assert (layer.window, layer.rank, len(layer.core), layer.causal) == (7, 5, 3, True)
        assert layer.out_weight.shape == (7, 7, 16)
    assert not any(layer.causal for layer in attentions(build(tensorized_noncausal=True)))


def test_activation_checkpointing_changes_nothing():
    """--checkpoint-activations, which then recomputes the blocks within a recomputation, gives the same gradients."""
    tokens = torch.tensor([[2, 5, 6, 7, 8, 9], [2, 9, 5, 1, 1, 1]])
    gradients = []
    for recompute in (False, True):
        model = build(checkpoint_activations=recompute, norm_warmup_updates=3).double().train()
        for _ in range(2):
            model.zero_grad()
            model(tokens)[0][tokens.ne(toy.PAD)].log_softmax(-1)[:, 5].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed, rtol=1e-10, atol=1e-12)


def test_the_noncausal_model_is_labelled(caplog):
    """Building it warns that its perplexity is not a language model's; building the causal one does not."""
    with caplog.at_level(logging.WARNING):
        build()
        assert "perplexity" not in caplog.text
        build(tensorized_noncausal=True)
    assert "NOT the perplexity of a language model" in caplog.text


def test_a_block_longer_than_the_window_is_refused():
    """A block of more than --tensorized-window tokens raises ValueError naming the flag to change."""
    with pytest.raises(ValueError, match="7 tokens.*--tensorized-window 6.*--tokens-per-sample 6"):
        build()(torch.tensor([[2, 4, 5, 6, 7, 8, 9]]))


def test_every_step_of_decoding_is_that_of_the_last_tokens():
    """Incremental decoding equals a pass over the text so far, or its last L tokens once it is longer than a window."""
    model = build().double().eval()
    tokens = torch.randint(4, 24, (3, 11), generator=torch.Generator().manual_seed(0))
    state = {}
    with torch.no_grad():
        for t in range(tokens.size(1)):
            step = model.decoder(tokens[:, : t + 1], incremental_state=state)[0]
            window = tokens[:, max(0, t + 1 - 6) : t + 1]
            assert step.shape[:2] == (3, 1)
            torch.testing.assert_close(step[:, 0], model(window)[0][:, -1], rtol=1e-12, atol=1e-12)


MEMORY = """
import resource
import torch, toy
from torch.nn import functional as F
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = toy.build("tensorized_lm_pn_ptb", randomize=False, task_symbols=9996, sizes={})
optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4)
tokens = torch.randint(4, 10000, (120, 33))
for _ in range(2):
    optimizer.zero_grad()
    logits = model.train()(tokens[:, :-1])[0]
    assert logits.shape == (120, 32, 10000)
    loss = F.nll_loss(model.get_normalized_probs((logits,), log_probs=True).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, loss.item())
"""


@pytest.mark.slow
def test_a_training_step_at_penn_treebank_size_needs_less_than_4_gb(root):
    """Two Adam steps of tensorized_lm_pn_ptb (3 layers, 120 windows of 32, 10,000 words) in a process of under 4 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-3000:]
    base, peak, _ = (float(word) for word in done.stdout.split()[-3:])
    print(f"peak {peak / 2**20:.2f} GB, of which {base / 2**20:.2f} GB before the model")
    assert peak - base > 0.1 * 2**20 and peak < 4 * 2**20
