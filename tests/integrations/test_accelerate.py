"""Running statistics in loops written with accelerate."""
import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")
pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from small_models import LENGTH, SENTENCES, STEPS, assert_same, build, mean_over_tokens, sentences, state, steps

from fairseq_powernorm.integrations.accelerate import AcceleratedStatistics, check_parallelism
from fairseq_powernorm.statistics import running_norms


def equally_long(number=STEPS * SENTENCES):
    """Sentences of one length: accelerate averages the losses of micro-batches, however many tokens they have."""
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{**each, "attention_mask": mask, "labels": each["input_ids"]} for each in sentences(number)]


def scaled(accelerator):
    """With the loss scale of fp16 training, which accelerate has on GPUs only; the first scale is 1024."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    return accelerator


def trained(
    model, *, size=2, accumulate=4, number=STEPS * SENTENCES, optimizer=torch.optim.SGD, rate=0.3, scale=False, bad=None,
    watch=None,
):
    """A model after one epoch; ``bad``: micro-batch, counted from 0 -> factor of its loss, or None to leave it out."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if scale:
        scaled(accelerator)
    loader = torch.utils.data.DataLoader(equally_long(number), batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, optimizer(model.parameters(), rate), loader)
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model), statistics.batch():
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            factor = (bad or {}).get(index, 1.0)
            if factor is not None:
                accelerator.backward(mean_over_tokens(output, batch["labels"]) * factor)
                optimizer.step()
            optimizer.zero_grad()
        if watch is not None:
            watch.append((state(model), accelerator.optimizer_step_was_skipped))
    statistics.release()
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_micro_batches_equal_one_batch(kind):
    """Six steps of 4 micro-batches of 2 sentences and of one batch of 8: the same parameters and statistics, which take one
    step with each of the optimizer.
    """
    one, four = trained(build(kind), size=SENTENCES, accumulate=1), trained(build(kind))
    assert steps(one) == steps(four) == {STEPS}
    assert_same(state(four), state(one), rtol=1e-5, atol=1e-9)


def test_a_shorter_last_step():
    """10 micro-batches: steps of 4 + 4 + 2, as accelerate takes one at the end of the data."""
    assert steps(trained(build("bert"), number=20)) == {3}


def test_batch_norm_pools_its_micro_batches():
    """The first BN of a model receives the same rows in 4 micro-batches and in one: mean and variance take the same step."""
    one = trained(build("bert", "batch"), size=SENTENCES, accumulate=1, number=8)
    four = trained(build("bert", "batch"), number=8)
    first = [dict(next(iter(running_norms(model).values())).named_buffers()) for model in (one, four)]
    assert steps(one) == steps(four) == {1}
    assert_same(first[0], first[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_leaves_no_statistics(fused):
    """A loss scale, and an infinite loss in the second micro-batch of the third step: the optimizer leaves the step out, and
    parameters and buffers keep their bits; a fused optimizer, which accelerate takes to have taken it, is no exception.
    """
    watch = []
    model = trained(
        build("bert"), number=40, scale=True, bad={9: float("inf")}, watch=watch, rate=0.01,
        optimizer=lambda p, rate: torch.optim.AdamW(p, rate, fused=fused),
    )
    assert steps(model) == {4}
    assert_same(watch[7][0], watch[11][0])
    assert watch[11][1] is not fused
    name = next(name for name in watch[0][0] if name.endswith("running_phi"))
    for before, after in ((3, 7), (11, 15), (15, 19)):
        assert not torch.equal(watch[before][0][name], watch[after][0][name])


def test_the_loss_scale_is_taken_out():
    """With a loss scale, a power of two: parameters and statistics are those without, to the bit."""
    assert_same(state(trained(build("bert"), number=24)), state(trained(build("bert"), number=24, scale=True)))


def test_a_step_that_the_loop_leaves_out():
    """The loop leaves backward pass and step of the last of 4 micro-batches out and clears the gradients: no statistics of
    this step remain, and the next one is as if it had not been.
    """
    watch = []
    model = trained(build("bert"), number=16, bad={3: None}, watch=watch)
    assert steps(model) == {1}
    assert_same(watch[3][0], state(build("bert")))


def test_checkpoints_of_optimizers_that_have_no_state_yet():
    """torch's distributed checkpoints have an optimizer without state take a step with a learning rate of zero: the
    statistics take none, and no batch is missed.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    accelerator = Accelerator(cpu=True)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        model = build("gpt")
        before = state(model)
        model, optimizer = accelerator.prepare(model, kind(model.parameters(), 0.1))
        statistics = AcceleratedStatistics(accelerator, model, optimizer)
        get_optimizer_state_dict(model, optimizer)
        assert_same(state(model), before)
        statistics.release()


def test_wrong_use():
    """An optimizer that is not prepared, a second taker, a model without norms, an unknown sync, a step without a batch."""
    accelerator = Accelerator(cpu=True)
    model = build("gpt")
    plain = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"optimizer of type SGD: pass model and optimizer as accelerator.prepare\(\)"):
        AcceleratedStatistics(accelerator, model, plain)
    model, optimizer = accelerator.prepare(model, plain)
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        AcceleratedStatistics(accelerator, model, optimizer, sync="always")
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    with pytest.raises(ValueError, match="AcceleratedStatistics: the statistics of .* have been taken over already"):
        AcceleratedStatistics(accelerator, model, optimizer)
    with pytest.raises(RuntimeError, match="the optimizer has taken a step without a batch: wrap forward pass"):
        optimizer.step()
    statistics.release()
    statistics.release()
    optimizer.step()
    other = build("gpt", None)
    with pytest.raises(ValueError, match="AcceleratedStatistics: no norm of the model has running statistics"):
        AcceleratedStatistics(accelerator, *accelerator.prepare(other, torch.optim.SGD(other.parameters(), 0.1)))


def test_parallelism_that_is_not_supported():
    """DeepSpeed, and tensor, context and sequence parallelism, are named; data parallelism is not refused."""
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        check_parallelism("X", kind, None)
        check_parallelism("X", kind, SimpleNamespace(tp_size=1, cp_size=1, sp_size=1, dp_shard_size=4))
    with pytest.raises(ValueError, match="X: distributed type DEEPSPEED scales gradients in a way of its own"):
        check_parallelism("X", DistributedType.DEEPSPEED, None)
    for name in ("tp", "cp", "sp"):
        with pytest.raises(ValueError, match=f"X: ParallelismConfig with {name}_size=2: must be 1"):
            check_parallelism("X", DistributedType.MULTI_GPU, SimpleNamespace(**{f"{name}_size": 2}))
