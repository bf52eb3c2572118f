"""Threads: evaluation needs no mask of anybody's, and training passes of one norm follow each other undisturbed."""
import threading

import pytest
import torch
from norm_cases import CASES, C, assert_all_close, batch, make

from fairseq_powernorm.norms import MaskSlot


def in_threads(functions):
    """Run functions at the same time, beginning together; re-raises what one of them raises."""
    barrier, errors = threading.Barrier(len(functions)), []

    def work(function):
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name, variant", CASES)
def test_evaluation_with_batches_of_different_lengths(name, variant):
    """Two threads with one model whose layers hold masks: each gets what it gets alone."""
    norm = make(name, variant).eval()
    norm.mask_slot = MaskSlot()
    inputs = [torch.randn(length, 2, C) for length in (3, 7)]
    expected = [norm(x) for x in inputs]
    found = [[], []]

    def evaluate(i):
        for _ in range(50):
            norm.mask_slot.padding_mask = torch.zeros(2, inputs[i].size(0), dtype=torch.bool)
            found[i].append(norm(inputs[i]))
            norm.mask_slot.padding_mask = None

    in_threads([lambda: evaluate(0), lambda: evaluate(1)])
    for each, expected_one in zip(found, expected):
        assert all(torch.equal(y, expected_one) for y in each)


@pytest.mark.parametrize("name, variant", CASES)
def test_each_thread_has_its_own_mask(name, variant):
    """A mask that another thread holds does not reach this one's training pass."""
    norm = make(name, variant)
    norm.mask_slot = MaskSlot()
    plain = make(name, variant)
    x, _, mask = batch()

    def hold():
        norm.mask_slot.padding_mask = mask

    in_threads([hold])
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("name, variant", CASES)
def test_training_from_several_threads(name, variant):
    """N threads with the same batch: the statistics and the gradients of N passes, none lost, none half."""
    threads, each = 4, 20
    norm, alone = make(name, variant, torch.float32, warmup_updates=0), make(name, variant, torch.float32, warmup_updates=0)
    x, dy, mask = batch()

    def train(norm):
        for _ in range(each):
            norm(x, mask).backward(dy)

    for _ in range(threads):
        train(alone)
    in_threads([lambda: train(norm)] * threads)
    assert norm.steps() == alone.steps() == threads * each
    statistics = [key for key in norm.STATISTICS if key != "ema_gz"]  # nu's steps depend on how passes interleave
    assert_all_close([getattr(norm, key) for key in statistics], [getattr(alone, key) for key in statistics])
    assert all(torch.isfinite(value).all() for value in norm.state_dict().values())
