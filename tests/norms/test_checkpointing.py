"""Activation checkpointing without a task: gradients and statistics as without it, or a refusal that says why."""
import pytest
import torch
from norm_cases import CASES, C, assert_all_close, batch, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_powernorm.norms.recomputation import Recomputations


def pattern_shared(f, norm, linear, x, mask):
    """One norm twice in a row, each call a segment of its own."""
    return f(lambda h: norm(linear(h), mask), f(lambda h: norm(linear(h), mask), x))


def pattern_one_segment(f, norm, linear, x, mask):
    """Both calls in one segment."""
    return f(lambda h: norm(linear(norm(linear(h), mask)), mask), x)


def pattern_nested(f, norm, linear, x, mask):
    """A segment inside a segment."""
    return f(lambda h: norm(linear(f(lambda g: norm(linear(g), mask), h)), mask), x)


def pattern_three(f, norm, linear, x, mask):
    """Three segments, one of which is not checkpointed."""
    h = f(lambda h: norm(linear(h), mask), x)
    h = norm(linear(h), mask)
    return f(lambda h: norm(linear(h), mask), h)


PATTERNS = [pattern_shared, pattern_one_segment, pattern_nested, pattern_three]
#: every norm with a warm-up that ends in between; PN, whose passes it changes most, before and after it, too
WARMUPS = [(*case, warmup) for case in CASES for warmup in ((0, 4, 100) if case[0] == "power" else (4,))]


def run(name, variant, warmup, pattern, f, steps=3, separate=False):
    """Gradients and statistics after some steps of SGD."""
    norm = make(name, variant, torch.float64, warmup_updates=warmup)
    torch.manual_seed(1)
    linear = nn.Linear(C, C).double()
    found = []
    for step in range(steps):
        x, dy, mask = batch(step, torch.float64)
        x = x.requires_grad_()
        y = pattern(f, norm, linear, x, mask)
        if separate:  # two losses, the second one first
            other = pattern(f, norm, linear, x.detach().flip(0).requires_grad_(), mask.flip(1))
            other.backward(dy)
        y.backward(dy)
        found += [x.grad, *(p.grad.clone() for p in (*norm.parameters(), *linear.parameters()))]
    return found + list(norm.buffers())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name, variant, warmup", WARMUPS)
def test_checkpointing_changes_nothing(name, variant, warmup, pattern, reentrant):
    """Calls in any arrangement before one backward pass: every gradient and statistic as without checkpointing."""
    plain = run(name, variant, warmup, pattern, lambda g, x: g(x))
    found = run(name, variant, warmup, pattern, lambda g, x: checkpoint(g, x, use_reentrant=reentrant))
    assert_all_close(found, plain, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name, variant", CASES)
def test_two_passes_before_two_backward_passes(name, variant, reentrant):
    """Two losses whose backward passes run in the other order."""
    plain = run(name, variant, 0, pattern_shared, lambda g, x: g(x), separate=True)
    found = run(name, variant, 0, pattern_shared, lambda g, x: checkpoint(g, x, use_reentrant=reentrant), separate=True)
    assert_all_close(found, plain, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_what_cannot_be_told_apart_is_refused(variant, reentrant):
    """The same input twice, with other statistics each: no number, but an error that names what helps."""
    norm = make("power", variant, warmup_updates=0)
    x = batch()[0].requires_grad_()
    y = checkpoint(norm, x, use_reentrant=reentrant) + checkpoint(norm, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="RunningStatistics"):
        y.sum().backward()


def test_the_same_input_in_the_warm_up_is_no_question():
    """While the batch's own moment divides, two passes over the same input are the same pass."""
    results = []
    for f in (lambda g, x: g(x), lambda g, x: checkpoint(g, x, use_reentrant=False)):
        norm = make("power", "reference", torch.float64, warmup_updates=100)
        x, dy, _ = batch(0, torch.float64)
        x.requires_grad_()
        (f(norm, x) + f(norm, x)).backward(dy)
        results.append([x.grad, *norm.buffers()])
    assert_all_close(*results, 1e-12)


@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_passes_that_were_never_repeated_are_in_nobodys_way(variant):
    """Hundreds of training passes without gradient, then checkpointing: exact."""
    results = []
    for f in (lambda g, x: g(x), lambda g, x: checkpoint(g, x, use_reentrant=True)):
        norm = make("power", variant, torch.float64, warmup_updates=3)
        with torch.no_grad():
            for step in range(300):
                norm(batch(step, torch.float64)[0])
        for step in range(2):
            x, dy, _ = batch(step, torch.float64)
            x.requires_grad_()
            f(norm, x).backward(dy)
        results.append([x.grad, *norm.buffers()])
    assert_all_close(*results, 1e-12)


@pytest.mark.parametrize("save", ["mm", "aten", "nothing"])
@pytest.mark.parametrize("name, variant, warmup", [case for case in WARMUPS if case[0] != "power" or case[2] != 4])
def test_selective_checkpointing(name, variant, save, warmup):
    """torch's selective checkpointing, whatever it saves: it counts operations, of which bookkeeping must be none."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if save in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    def selective():
        return run(
            name, variant, warmup, pattern_shared, lambda g, x: checkpoint(g, x, use_reentrant=False, context_fn=contexts)
        )

    if name == "power" and save == "aten":  # which computes in place
        with pytest.raises(RuntimeError, match="has been mutated"):
            selective()
    else:
        assert_all_close(selective(), run(name, variant, warmup, pattern_shared, lambda g, x: g(x)), 1e-12)


def test_records_of_replicas_on_other_devices_are_passed_over():
    """Replicas of data parallelism share the record of the passes: one is sought among those of its own device."""
    passes, sums = Recomputations(), torch.arange(4.0)
    passes.remember(torch.ones(2, device="meta"), None, sums.to("meta"))
    passes.remember(torch.ones(2), None, sums)
    assert passes.recall(sums).state.device == sums.device
