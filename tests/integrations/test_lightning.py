"""Running statistics in Lightning's Trainer."""
import logging
import warnings

import pytest

pytest.importorskip("lightning", reason="lightning is not installed: the extra is integrations")
pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")

from types import SimpleNamespace

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from small_models import SENTENCES, STEPS, assert_same, build, mean_over_tokens, sentences, state, steps

from fairseq_powernorm.integrations.lightning import RunningStatisticsCallback
from fairseq_powernorm.statistics import RunningStatistics, running_norms

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """A small model; in chosen micro-batches, counted from 0, its loss is multiplied by a number or left out."""

    def __init__(self, kind="bert", optimizer=torch.optim.SGD, rate=0.3, bad=None, **options):
        super().__init__()
        self.model = build(kind, **options)
        self.optimizer, self.rate, self.bad = optimizer, rate, bad or {}
        self.count = 0
        self.seen = []

    def loss(self, batch):
        labels = batch["labels"]
        return mean_over_tokens(self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), labels)

    def training_step(self, batch, index):
        loss, factor = self.loss(batch), self.bad.get(self.count, 1.0)
        self.count += 1
        if isinstance(factor, Exception):
            raise factor
        return None if factor is None else loss * factor

    def on_train_batch_end(self, *args):
        self.seen.append(state(self.model))

    def validation_step(self, batch, index):
        self.log("valid", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.rate)


def equally_long(number=STEPS * SENTENCES, seed=0):
    """Sentences of one length: Lightning averages the losses of micro-batches, however many tokens they have."""
    found = sentences(number, seed=seed)
    for example in found:
        example["attention_mask"][:5], example["attention_mask"][5:] = 1, 0
        example["input_ids"][:5] = example["input_ids"][:5].clamp(min=3)
        example["labels"] = example["input_ids"].masked_fill(example["attention_mask"] == 0, -100)
    return found


class Batches:
    """A loader that a checkpoint can stop in the middle of, as torchdata's are."""

    def __init__(self, examples, size):
        self.examples, self.size, self.at = examples, size, 0

    def __len__(self):
        return len(self.examples) // self.size

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield torch.utils.data.default_collate(self.examples[(self.at - 1) * self.size : self.at * self.size])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def trained(folder, module, *, data=None, size=2, accumulate=4, valid=None, callbacks=(), resume=None, **options):
    settings = dict(
        max_steps=STEPS, accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=2,
    )
    trainer = lightning.Trainer(callbacks=[RunningStatisticsCallback(), *callbacks], **{**settings, **options})
    loaders = [None if each is None else Batches(each, size) for each in (equally_long() if data is None else data, valid)]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return module.model


# ---------------------------------------------------------------- one step of the optimizer, one of the statistics


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_micro_batches_equal_one_batch(kind, tmp_path):
    """Six steps of 4 micro-batches of 2 sentences and of one batch of 8: the same parameters and statistics, which take one
    step with each of the optimizer.
    """
    one = trained(tmp_path, Module(kind), size=SENTENCES, accumulate=1)
    four = trained(tmp_path, Module(kind))
    assert steps(one) == steps(four) == {STEPS}
    assert_same(state(four), state(one), rtol=1e-5, atol=1e-9)


def test_a_shorter_last_step_of_an_epoch(tmp_path):
    """10 micro-batches an epoch are steps of 4 + 4 + 2 micro-batches: six in two epochs, each with one of the statistics."""
    model = trained(tmp_path, Module(), data=equally_long(20), max_steps=-1, max_epochs=2)
    assert steps(model) == {6}


def test_batch_norm_pools_its_micro_batches(tmp_path):
    """The first BN of a model receives the same rows in 4 micro-batches and in one: mean and variance take the same step."""
    one = trained(tmp_path, Module(norm="batch"), max_steps=1, size=SENTENCES, accumulate=1)
    four = trained(tmp_path, Module(norm="batch"), max_steps=1)
    assert steps(one) == steps(four) == {1}
    first = [dict(next(iter(running_norms(model).values())).named_buffers()) for model in (one, four)]
    assert_same(first[0], first[1], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- steps that are not taken


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_leaves_no_statistics(fused, tmp_path):
    """A loss scale, and an infinite loss in the second micro-batch of the third step: the optimizer leaves the step out, and
    parameters and buffers keep their bits; a fused optimizer, which leaves it out inside of itself, is no exception.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    precision.forward_context = warnings.catch_warnings  # float64 in place of half precision
    module = Module(
        optimizer=lambda p, rate: torch.optim.AdamW(p, rate, fused=fused), rate=0.01, bad={9: float("inf")}
    )
    model = trained(tmp_path, module, plugins=[precision], max_steps=5)
    assert steps(model) == {4}
    assert_same(module.seen[7], module.seen[11])  # after the second step and after the third
    name = next(name for name in module.seen[0] if name.endswith("running_phi"))
    for before, after in ((3, 7), (11, 15), (15, 19)):
        assert not torch.equal(module.seen[before][name], module.seen[after][name])


def test_the_loss_scale_is_taken_out(tmp_path):
    """With a loss scale, a power of two: parameters and statistics are those without, to the bit."""
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    precision.forward_context = warnings.catch_warnings
    plain, scaled = trained(tmp_path, Module(), max_steps=3), trained(tmp_path, Module(), max_steps=3, plugins=[precision])
    assert_same(state(plain), state(scaled))


@pytest.mark.parametrize("where", [0, 3])
def test_a_micro_batch_without_a_loss(where, tmp_path):
    """``training_step`` returns None in the first or last of 4 micro-batches: the step is that of the other three."""
    rows = equally_long(8)
    others = rows[2:] if where == 0 else rows[:6]
    left_out = trained(tmp_path, Module(bad={where: None}), data=rows, max_steps=1)
    # Lightning divides by 4 all the same
    three = trained(tmp_path, Module(bad=dict.fromkeys(range(3), 0.75)), data=others, max_steps=1, accumulate=3)
    assert_same(state(left_out), state(three), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- checkpoints, validation, the life of a training


def test_resuming(tmp_path):
    """6 steps, and 3 steps, a checkpoint in the middle of an epoch, and the other 3: the same bits."""
    options = dict(optimizer=torch.optim.AdamW, rate=0.01)
    fitting = dict(data=equally_long(40), max_steps=6)
    whole = trained(tmp_path, Module(**options), **fitting)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trained(tmp_path, Module(**options), **fitting, callbacks=[keep], enable_checkpointing=True)
    resumed = trained(tmp_path, Module(**options), **fitting, resume=tmp_path / "step=3.ckpt")
    assert steps(resumed) == {6}
    assert_same(state(whole), state(resumed))


def test_validation_in_between_changes_nothing(tmp_path):
    """A sanity check before training and validation after every second micro-batch: the same bits."""
    plain = trained(tmp_path, Module(), max_steps=3)
    valid = dict(valid=equally_long(4, seed=1), val_check_interval=2)
    assert_same(state(plain), state(trained(tmp_path, Module(), max_steps=3, **valid)))


def test_norms_are_free_after_training(tmp_path):
    """After training, and after one that ended with an error, a norm applies its statistics itself again."""
    batch = torch.utils.data.default_collate(sentences(2))
    module = Module()
    trained(tmp_path, module, max_steps=1)
    module.loss(batch).backward()
    assert steps(module) == {2}
    module = Module(bad={5: RuntimeError("enough")})
    with pytest.raises(RuntimeError, match="enough"):
        trained(tmp_path, module, max_steps=3)
    assert steps(module) == {1}
    module.loss(batch).backward()
    assert steps(module) == {2}


# ---------------------------------------------------------------- wrong use


def test_attached_twice(tmp_path):
    """Two callbacks, or the same one twice, are an error before any training."""
    with pytest.raises(ValueError, match="attached twice to one trainer; attach it once"):
        trained(tmp_path, Module(), callbacks=[RunningStatisticsCallback()])


def test_what_cannot_work_is_refused(tmp_path):
    """No norms with running statistics, norms that somebody else drives, manual optimization, an unknown sync."""
    with pytest.raises(ValueError, match="no norm of the model has running statistics"):
        trained(tmp_path, Module(norm=None))
    taken = Module()
    statistics = RunningStatistics(taken)
    with pytest.raises(ValueError, match="the statistics of model.bert.embeddings.LayerNorm have been taken over already"):
        trained(tmp_path, taken)
    statistics.release()
    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="with manual optimization the module says what a step is"):
        trained(tmp_path, manual, accumulate=1)
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        RunningStatisticsCallback(sync="always")
    with pytest.raises(RuntimeError, match="no training is in progress"):
        _ = RunningStatisticsCallback().following


def test_parallelism_that_is_not_supported():
    """A strategy that is neither one device nor data parallel is named, by its class."""
    module, callback = Module(), RunningStatisticsCallback()
    trainer = SimpleNamespace(callbacks=[callback], strategy=type("OddStrategy", (), {})())
    with pytest.raises(ValueError, match="strategy OddStrategy scales gradients in a way of its own; must be one of Single"):
        callback.setup(trainer, module, "fit")
    callback.setup(trainer, module, "validate")
