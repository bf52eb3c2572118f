"""Does a model in evaluation really compute Power Normalization? Holds transformer_pn to its formula.

    python tests/checks/evaluation.py [CHECKPOINT ...]

fairseq 0.12.2 can evaluate an encoder layer by one fused function that computes LayerNorm whatever module stands there.
It does so only with post-norm, after a state dict has been loaded and without a training step before, which is how
fairseq-generate comes to a model. This program therefore loads a state dict into each model that it builds (or takes the
models of CHECKPOINT ...), evaluates it, and compares with Transformer and PN written out in float64. It then brings a
copy of the model onto the fused path and requires that the comparison fails: proof that it can.

Exits 1 if a check fails.
"""
import copy
import sys
from argparse import Namespace

import fairseq
import numpy
import torch
from torch.nn.functional import layer_norm, linear

import fairseq_powernorm.register  # noqa: F401  (before anything of fairseq is used)

# isort: split
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig

from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.tasks import TranslationPNTask

LAYER_SCALE_EPS = 1e-5
#: largest difference between float32 evaluation and the formula in float64, relative to the largest value
TOLERANCE = 1e-5
#: how far LayerNorm in place of PN must at least be from it, on the same scale
DISTINCT = 1e-2


# ---- the formula ---------------------------------------------------------------------------------
def power_norm(x, norm):
    """u * weight / sqrt(phi + eps) + bias, with u the layer scale of x (``B x T x C``) in groups of channels."""
    grouped = x.reshape(*x.shape[:-1], norm.groups, -1)
    u = (grouped / (grouped.square().mean(-1, keepdim=True) + LAYER_SCALE_EPS).sqrt()).reshape(x.shape)
    return u * norm.weight.double() / (norm.running_phi.double() + norm.eps).sqrt() + norm.bias.double()


def layer_norm_instead(x, norm):
    """What the fused path computes in the place of PN."""
    return layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)


def affine(x, module):
    return linear(x, module.weight.double(), module.bias.double())


def attention(module, query, memory, blocked):
    """Multi-head attention; ``blocked`` is True where a query must not look (``B x 1 x S`` or ``B x T x S``)."""
    batch, length, channels = query.shape

    def heads(x):
        return x.reshape(batch, -1, module.num_heads, channels // module.num_heads).transpose(1, 2)

    q, k, v = (heads(affine(x, p)) for x, p in (
        (query, module.q_proj), (memory, module.k_proj), (memory, module.v_proj)))
    scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
    context = scores.masked_fill(blocked.unsqueeze(1), float("-inf")).softmax(-1) @ v
    return affine(context.transpose(1, 2).reshape(batch, length, channels), module.out_proj)


def residual(x, norm, sublayer, pre_norm, normalize):
    return x + sublayer(normalize(x, norm)) if pre_norm else normalize(x + sublayer(x), norm)


def feed_forward(layer):
    return lambda x: affine(affine(x, layer.fc1).relu(), layer.fc2)


def expected(model, source, target, normalize):
    """Encoder output and decoder features of ``model`` (``B x T x C``, float64) with ``normalize`` at every norm."""
    encoder, decoder = model.encoder, model.decoder
    padding = source.eq(encoder.padding_idx)
    x = encoder.forward_embedding(source)[0].double().masked_fill(padding.unsqueeze(-1), 0)
    blocked = padding.unsqueeze(1)
    for layer in encoder.layers:
        pre = layer.normalize_before
        x = residual(x, layer.self_attn_layer_norm, lambda y: attention(layer.self_attn, y, y, blocked), pre, normalize)
        x = residual(x, layer.final_layer_norm, feed_forward(layer), pre, normalize)
    memory = x if encoder.layer_norm is None else normalize(x, encoder.layer_norm)

    x = (decoder.embed_scale * decoder.embed_tokens(target) + decoder.embed_positions(target)).double()
    later = torch.ones(target.size(1), target.size(1), dtype=torch.bool).triu(1)
    unseen = later | target.eq(decoder.padding_idx).unsqueeze(1)
    for layer in decoder.layers:
        pre = layer.normalize_before
        x = residual(x, layer.self_attn_layer_norm, lambda y: attention(layer.self_attn, y, y, unseen), pre, normalize)
        x = residual(
            x, layer.encoder_attn_layer_norm, lambda y: attention(layer.encoder_attn, y, memory, blocked), pre, normalize)
        x = residual(x, layer.final_layer_norm, feed_forward(layer), pre, normalize)
    return memory, x if decoder.layer_norm is None else normalize(x, decoder.layer_norm)


# ---- models and batches --------------------------------------------------------------------------
def build(post_norm):
    """A tiny model with PN at every position, far from its initial statistics, as it stands after loading a checkpoint."""
    dictionary = Dictionary()
    for word in range(40):
        dictionary.add_symbol(str(word))
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
        ("layers", 2), ("embed_dim", 32), ("ffn_embed_dim", 64), ("attention_heads", 4), ("norm_self", "power"),
        ("norm_ff", "power"))}
    task = TranslationPNTask(TranslationConfig(), dictionary, dictionary)
    model = task.build_model(Namespace(arch="transformer_pn_tiny", _name="transformer_pn", post_norm=post_norm, **sizes))
    with torch.no_grad():
        for norm in power_norms(model).values():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.5)
            norm.running_phi.uniform_(0.25, 4.0)
    model.load_state_dict(model.state_dict())
    return task, model


def fused(model):
    """A copy of the model whose encoder layers are ready for fairseq's fused path, as its own are after loading."""
    model = copy.deepcopy(model)
    for layer in model.encoder.layers:
        attn = layer.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        weights = {f"in_proj_{kind}": torch.cat([getattr(p, kind) for p in projections]) for kind in ("weight", "bias")}
        for name, module in (("out_proj", attn.out_proj), ("fc1", layer.fc1), ("fc2", layer.fc2)):
            weights.update({f"{name}_{kind}": getattr(module, kind) for kind in ("weight", "bias")})
        for name, weight in weights.items():
            setattr(layer, name, torch.nn.Parameter(weight.detach()))
        layer.load_to_BT = layer.can_use_fastpath = True
    return model


def power_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PowerNorm)}


def batches(dictionary):
    """(name, source, target) with the paddings that there are; sources are left-padded by default, targets right-padded."""
    for name, lengths in (("unpadded", (7, 7, 7)), ("one sentence", (5,)), ("left-padded", (7, 4, 6)),
                          ("right-padded", (7, 4, 6))):
        source, target = (
            torch.full((len(lengths), max(lengths)), dictionary.pad(), dtype=torch.long) for _ in range(2))
        for row, length in enumerate(lengths):
            first = max(lengths) - length if name == "left-padded" else 0
            for tensor, begin in ((source, first), (target, 0)):
                tensor[row, begin:begin + length] = torch.randint(dictionary.nspecial, len(dictionary), (length,))
        yield name, source, target


# ---- checks --------------------------------------------------------------------------------------
def distance(got, wanted, valid):
    """Largest difference at non-padding positions, relative to the largest value there."""
    got, wanted = got.double()[valid], wanted[valid]
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def compare(model, source, target, normalize=power_norm):
    """(largest distance of ``model`` from the formula, calls of each power norm in one forward pass).

    The encoder is compared by itself, the decoder with the model's own encoder before it.
    """
    calls = dict.fromkeys(power_norms(model), 0)

    def counter(name):
        def count(*_):
            calls[name] += 1
        return count

    hooks = [norm.register_forward_hook(counter(name)) for name, norm in power_norms(model).items()]
    pad = model.encoder.padding_idx
    try:
        encoded = model.encoder(source, src_lengths=source.ne(pad).sum(1))
        decoded, _ = model.decoder(target, encoder_out=encoded, features_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    got = (encoded["encoder_out"][0].transpose(0, 1), decoded)
    wanted = expected(model, source, target, normalize)
    far = max(distance(g, w, tokens.ne(pad)) for g, w, tokens in zip(got, wanted, (source, target)))
    return far, calls


def outcome(model, source, target):
    """What the comparison says of a model: None if it holds, else how it fails, in words."""
    try:
        far, calls = compare(model, source, target)
    except RuntimeError as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    skipped = [name for name, number in calls.items() if number != 1]
    problems = [f"off the formula by {far:.1e}"] if not far <= TOLERANCE else []
    if skipped:
        problems.append(f"{len(skipped)} of {len(calls)} power norms not called once, such as {skipped[0]}")
    return "; ".join(problems) or None


def check(name, task, model):
    """Print a line for each check of one model; True if all hold."""
    model.eval()
    passed = True

    def report(holds, text):
        nonlocal passed
        passed = passed and holds
        print(f"{'ok  ' if holds else 'FAIL'}  {name}: {text}")

    norms = power_norms(model)
    report(bool(norms), f"{len(norms)} power norms in the model")
    control = fused(model)
    for batch, source, target in batches(task.source_dictionary):
        problem = outcome(model, source, target)
        far, _ = compare(model, source, target)
        report(problem is None, f"{batch}: " + (
            problem or f"each power norm called once, within {far:.1e} of the formula (allowed {TOLERANCE:.0e})"))
        far, _ = compare(model, source, target, layer_norm_instead)
        report(far > DISTINCT, f"{batch}: LayerNorm in its place would be off by {far:.1e} (needed {DISTINCT:.0e})")
        problem = outcome(control, source, target)
        report(problem is not None, f"{batch}: on the fused path the check " + (
            f"fails as it must: {problem}" if problem else "does not fail: it proves nothing"))
    return passed


def main(checkpoints):
    torch.manual_seed(1)
    print(f"fairseq {fairseq.__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
          f"Python {sys.version.split()[0]}")
    if checkpoints:
        results = []
        for path in checkpoints:
            models, _, task = checkpoint_utils.load_model_ensemble_and_task([path])
            results.append(check(path, task, models[0]))
    else:
        results = [check("post-norm" if post_norm else "pre-norm", *build(post_norm)) for post_norm in (False, True)]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
