"""Running statistics in transformers' Trainer."""
import logging

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")

import torch
from small_models import SENTENCES, STEPS, assert_same, build, mean_over_tokens, sentences, state, steps
from transformers import Trainer, TrainerCallback, TrainingArguments

from fairseq_powernorm.integrations.hugging_face import RunningStatisticsCallback, RunningStatisticsMixin
from fairseq_powernorm.statistics import RunningStatistics, running_norms


class MixedTrainer(RunningStatisticsMixin, Trainer):
    """A trainer of one's own."""


class ScaledTrainer(Trainer):
    """With the loss scale of fp16 training, which transformers has on GPUs only; the first scale is 1024."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)


def trainer_of(
    folder, model, *, mixin=False, data=None, evaluated=None, callbacks=(), base=Trainer, loss=mean_over_tokens, **options
):
    """A trainer with SGD that neither logs nor saves, with the callback or the mixin."""
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=STEPS,
        optim="sgd", learning_rate=0.3, lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, max_grad_norm=0.0, logging_strategy="no",
    )
    parts = dict(
        model=model, args=TrainingArguments(**{**settings, **options}), compute_loss_func=loss,
        train_dataset=sentences() if data is None else data, eval_dataset=evaluated,
    )
    if mixin:
        return type("Mixed", (RunningStatisticsMixin, base), {})(**parts, callbacks=list(callbacks))
    return base(**parts, callbacks=[RunningStatisticsCallback(), *callbacks])


def trained(folder, model, **options):
    trainer_of(folder, model, **options).train()
    return model


class Watch(TrainerCallback):
    """The buffers of the norms after each step, and whatever is done before the optimizer takes one."""

    def __init__(self, before_step=lambda model: None):
        self.seen = []
        self.before_step = before_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before_step(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append({name: value.clone() for name, value in kwargs["model"].named_buffers()})


def bad_loss(value, *which):
    """A ``compute_loss_func`` that multiplies the losses of some micro-batches, counted from 0."""
    count = iter(range(10**6))

    def loss(outputs, labels, num_items_in_batch=None):
        found = mean_over_tokens(outputs, labels, num_items_in_batch)
        return found * value if next(count) in which else found

    return loss


# ---------------------------------------------------------------- one step of the optimizer, one of the statistics


@pytest.mark.parametrize("kind, mixin", [("bert", False), ("gpt", True)], ids=["bert-callback", "gpt-mixin"])
def test_micro_batches_equal_one_batch(kind, mixin, tmp_path):
    """Six steps of 4 micro-batches of 2 sentences and of one batch of 8: the same parameters and statistics, which take one
    step with each of the optimizer. GPT-2 computes its loss itself.
    """
    options = dict(mixin=mixin, loss=None if kind == "gpt" else mean_over_tokens)
    sizes = dict(per_device_train_batch_size=SENTENCES, gradient_accumulation_steps=1)
    one, four = trained(tmp_path, build(kind), **options, **sizes), trained(tmp_path, build(kind), **options)
    assert steps(one) == steps(four) == {STEPS}
    assert_same(state(four), state(one), rtol=1e-5, atol=1e-7)
    start = build(kind)
    for (name, before), after in zip(start.named_buffers(), four.buffers()):
        if "running_phi" in name or "ema_gz" in name:
            assert not torch.allclose(before, after, rtol=1e-3), name


def test_a_shorter_last_step_of_an_epoch(tmp_path):
    """20 sentences an epoch: micro-batches 4 + 4 + 2 give what batches of 8 + 8 + 4 give."""
    options = dict(data=sentences(20), max_steps=-1, num_train_epochs=2)
    sizes = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    one, four = trained(tmp_path, build("bert"), **options, **sizes), trained(tmp_path, build("bert"), **options)
    assert steps(one) == steps(four) == {6}
    assert_same(state(four), state(one), rtol=1e-5, atol=1e-9)


def test_padding_changes_nothing(tmp_path):
    """Sentences padded to 7 and to 12 tokens: the same buffers and parameters."""
    wide = dict(data=sentences(padding=12), max_steps=4)
    one, other = trained(tmp_path, build("bert"), max_steps=4), trained(tmp_path, build("bert"), **wide)
    assert_same(state(one), state(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "power-v", "power:warmup_updates=2"])
def test_other_norms_pool_their_micro_batches(norm, tmp_path):
    """The first norm of a model receives the same rows in 4 micro-batches and in one: its statistics of the forward pass
    take the same step, the variance of BN over all rows included; all norms take one per step of the optimizer.
    """
    sizes = dict(per_device_train_batch_size=SENTENCES, gradient_accumulation_steps=1)
    one = trained(tmp_path, build("bert", norm), max_steps=1, **sizes)
    four = trained(tmp_path, build("bert", norm), max_steps=1)
    assert steps(one) == steps(four) == {1}
    first = [dict(next(iter(running_norms(model).values())).named_buffers()) for model in (one, four)]
    for name in first[0].keys() - {"ema_gz"}:
        torch.testing.assert_close(first[0][name], first[1][name], rtol=1e-10, atol=1e-12)
    assert steps(trained(tmp_path, build("gpt", norm), max_steps=3, loss=None)) == {3}


def test_without_the_callback_micro_batches_take_a_step_each(tmp_path):
    """The callback makes the difference."""
    trainer = trainer_of(tmp_path, build("gpt"), max_steps=2, loss=None)
    trainer.remove_callback(RunningStatisticsCallback)
    trainer.train()
    assert steps(trainer.model) == {8}


def test_activation_checkpointing(tmp_path):
    """Layers whose activations are computed anew in the backward pass: the same parameters and statistics."""
    plain, model = trained(tmp_path, build("bert"), max_steps=3), build("bert")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(state(plain), state(trained(tmp_path, model, max_steps=3)))


# ---------------------------------------------------------------- steps that are not taken


@pytest.mark.parametrize("optim, mixin", [("sgd", True), ("adamw_torch_fused", False)])
def test_an_overflow_leaves_no_statistics(optim, mixin, tmp_path):
    """A loss scale, and an infinite loss in the second micro-batch of the third step: the optimizer leaves the step out, and
    parameters and buffers keep their bits; a fused optimizer, which leaves it out inside of itself, is no exception.
    """
    parameters = []

    def note(model):
        parameters.append([each.detach().clone() for each in model.parameters()])

    watch = Watch(note)
    options = dict(optim=optim, learning_rate=0.01, max_steps=5, base=ScaledTrainer, callbacks=[watch], mixin=mixin)
    model = trained(tmp_path, build("bert"), loss=bad_loss(float("inf"), 9), **options)
    assert steps(model) == {4}
    for one, other in zip(parameters[2], parameters[3]):  # before the third step and before the fourth
        assert torch.equal(one, other)
    assert_same(watch.seen[1], watch.seen[2])
    for before, after in ((0, 1), (2, 3), (3, 4)):
        name = next(name for name in watch.seen[0] if name.endswith("running_phi"))
        assert not torch.equal(watch.seen[before][name], watch.seen[after][name])


def test_the_loss_scale_is_taken_out(tmp_path):
    """With a loss scale, a power of two: the statistics are those without, to the bit. (The trainer's gradients are scaled
    back by the optimizer's step.)
    """
    plain, scaled = Watch(), Watch()
    trained(tmp_path, build("bert"), max_steps=3, callbacks=[plain])
    trained(tmp_path, build("bert"), max_steps=3, callbacks=[scaled], base=ScaledTrainer)
    for one, other in zip(plain.seen, scaled.seen):
        assert_same(one, other)


def test_a_gradient_that_is_not_finite(tmp_path, caplog):
    """A loss of NaN without a loss scale, whose gradients somebody sets to zero: the micro-batch is left out of nu, a
    warning says so once, and every buffer stays finite.
    """

    def clear(model):
        for parameter in model.parameters():
            torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)

    with caplog.at_level(logging.WARNING, logger="fairseq_powernorm"):
        model = trained(
            tmp_path, build("bert"), max_steps=4, loss=bad_loss(float("nan"), 5, 6, 9), callbacks=[Watch(clear)]
        )
    assert steps(model) == {4}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    (record,) = [each for each in caplog.records if each.name.startswith("fairseq_powernorm")]
    assert "statistics not finite and left out in 6 norms" in record.getMessage()


# ---------------------------------------------------------------- checkpoints and evaluation


def test_resuming_in_the_middle_of_an_epoch(tmp_path):
    """8 steps, and 5 steps, a checkpoint in the middle of an epoch, and the other 3: the same bits."""
    options = dict(data=sentences(48), optim="adamw_torch", learning_rate=0.01, max_steps=8)
    whole = trained(tmp_path / "whole", build("bert"), **options)
    saving = dict(save_strategy="steps", save_steps=5)
    first = trained(tmp_path / "parts", build("bert"), **options, **saving)
    resumed = build("bert")
    trainer = trainer_of(tmp_path / "parts", resumed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert steps(resumed) == {8}
    assert_same(state(whole), state(first))
    assert_same(state(whole), state(resumed))


def test_evaluation_in_between_changes_nothing(tmp_path):
    """Evaluation before training and after every second step, in the middle of the data: the same bits."""
    plain, evaluated = build("bert"), build("bert")
    trained(tmp_path, plain, max_steps=5)
    often = dict(eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer = trainer_of(tmp_path, evaluated, max_steps=5, evaluated=sentences(6, seed=1), **often)
    trainer.train()
    assert_same(state(plain), state(evaluated))
    before = state(evaluated)
    trainer.evaluate()
    assert_same(before, state(evaluated))


# ---------------------------------------------------------------- the life of a training


@pytest.mark.parametrize("mixin", [False, True], ids=["callback", "mixin"])
def test_norms_are_free_after_training(mixin, tmp_path):
    """After training a norm applies its statistics itself again, as in a second training by another trainer."""
    model = trained(tmp_path, build("bert"), max_steps=1, mixin=mixin)
    model(**{name: value[None] for name, value in sentences(1)[0].items()}).loss.backward()
    assert steps(model) == {2}
    trained(tmp_path, model, max_steps=2)
    assert steps(model) == {4}


class Interrupted(Exception):
    """What ends a training."""


def once(error, at):
    """A ``compute_loss_func`` that raises an error in one micro-batch."""
    count = iter(range(10**6))

    def loss(*args, **kwargs):
        if next(count) == at:
            raise error
        return mean_over_tokens(*args, **kwargs)

    return loss


def test_training_after_an_error(tmp_path):
    """A training that fails in a micro-batch leaves no statistics, and the trainer's next one is what the first would have
    been. With the mixin the norms are free at once, with the callback they wait for release() or that training.
    """
    example = {name: value[None] for name, value in sentences(1)[0].items()}
    plain = build("bert")
    trained(tmp_path, plain, max_steps=3)
    for mixin in (False, True):
        model = build("bert")
        start = state(model)
        trainer = trainer_of(tmp_path, model, max_steps=3, mixin=mixin, loss=once(Interrupted(), 1))
        with pytest.raises(Interrupted):
            trainer.train()
        assert_same(start, state(model))
        model(**example)
        assert steps(model) == {int(mixin)}
        model.load_state_dict(start)
        trainer.train()
        assert_same(state(plain), state(model))
    trainer = trainer_of(tmp_path, model, loss=once(Interrupted(), 1))
    with pytest.raises(Interrupted):
        trainer.train()
    trainer.pop_callback(RunningStatisticsCallback).release()
    model(**example)
    assert steps(model) == {4}


def test_smaller_batches_after_memory_ran_out(tmp_path):
    """``auto_find_batch_size``: training that begins anew with smaller batches takes the norms over anew."""
    loss = once(RuntimeError("CUDA out of memory."), 0)
    options = dict(auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=3)
    model = trained(tmp_path, build("bert"), per_device_train_batch_size=8, loss=loss, **options)
    assert steps(model) == {3}


# ---------------------------------------------------------------- wrong use


def test_attached_twice(tmp_path):
    """The same callback twice, two callbacks, callback and mixin: an error before any training."""
    trainer = trainer_of(tmp_path, build("gpt"), loss=None)
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, RunningStatisticsCallback)]
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="RunningStatisticsCallback: attached twice to one trainer; attach it once"):
        trainer.train()
    for mixin in (False, True):
        callback = RunningStatisticsCallback()
        trainer = trainer_of(tmp_path, build("gpt"), mixin=mixin, loss=None, callbacks=[callback])
        with pytest.raises(ValueError, match="have been taken over already; attach one callback"):
            trainer.train()
        assert steps(trainer.model) == {0}


def test_norms_that_somebody_else_drives(tmp_path):
    """RunningStatistics of one's own, and the callback: an error that names a norm."""
    model = build("gpt")
    RunningStatistics(model)
    with pytest.raises(ValueError, match="the statistics of transformer.h.0.ln_1 have been taken over already"):
        trainer_of(tmp_path, model, loss=None).train()


def test_a_model_without_running_statistics(tmp_path):
    """LayerNorm throughout: an error, as the callback would do nothing."""
    model = build("gpt", None)
    with pytest.raises(ValueError, match="RunningStatisticsCallback: no norm of the model has running statistics"):
        trainer_of(tmp_path, model, loss=None).train()


def test_unknown_sync(tmp_path):
    """The value and the choices are named when callback or trainer are made."""
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        RunningStatisticsCallback(sync="always")
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        MixedTrainer(build("gpt"), TrainingArguments(str(tmp_path), use_cpu=True), norm_sync="always")


def test_data_parallel_is_refused(tmp_path):
    """Two GPUs and one process, where transformers takes nn.DataParallel."""
    trainer = trainer_of(tmp_path, build("gpt"), loss=None)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="'not_distributed' .nn.DataParallel, .* start one process for each device"):
        trainer.train()


def test_no_training_in_progress():
    """``following`` exists during training only."""
    with pytest.raises(RuntimeError, match="no training is in progress"):
        _ = RunningStatisticsCallback().following
