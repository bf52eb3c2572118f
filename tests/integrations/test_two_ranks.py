"""Two processes joined by gloo, each with half of every step's micro-batches, in all trainers: what one process computes.

One pair of processes does everything, and the tests look at what it has written down.
"""
import contextlib
import datetime
import os
import socket
import sys

import loadable  # noqa: F401  (the other processes know nothing of conftest)
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")
pytest.importorskip("lightning", reason="lightning is not installed: the extra is integrations")

import torch
import torch.distributed as dist
from small_models import LENGTH, assert_same, build, mean_over_tokens, sentences
from torch import multiprocessing

pytestmark = pytest.mark.slow
RANKS = 2
STEPS = 10
HALF = STEPS // 2
RATE = 0.3


def equally_long(number):
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{**each, "attention_mask": mask, "labels": each["input_ids"]} for each in sentences(number)]


def batches_of(ranks):
    """This rank's share of all micro-batches."""
    loader = torch.utils.data.DataLoader(equally_long(STEPS * 8), batch_size=2)
    return list(loader)[dist.get_rank() if ranks > 1 else 0 :: ranks]


class Stream:
    """Micro-batches that a checkpoint can stop in the middle of, as torchdata's loaders are."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def blocks(model):
    return model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h


def sharding(accelerator):
    """FSDP2, which accelerate takes on accelerators only: the same code, told that it is one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    return accelerator


def whole(model):
    """The state of a model, whatever it is wrapped in and however it is sharded."""
    model = getattr(model, "module", model)
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


# ---------------------------------------------------------------- the trainers: 4 micro-batches of 2 sentences a step
#
# Each keeps a checkpoint in its folder after HALF of the steps, or begins with that one to resume.


def hugging_face(folder, kind, *, ranks, fsdp=False, sync="step", resume=False):
    from transformers import Trainer, TrainingArguments

    from fairseq_powernorm.integrations.hugging_face import RunningStatisticsCallback

    class Made(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if fsdp:
                sharding(self.accelerator)
                self.is_fsdp_enabled = True

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks, max_steps=STEPS,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        disable_tqdm=True, max_grad_norm=0.0, logging_strategy="no",
        save_strategy="no" if ranks == 1 or resume else "steps", save_steps=HALF,
    )
    model = build(kind, tied=False)
    trainer = Made(
        model, arguments, train_dataset=sentences(), compute_loss_func=None if kind == "gpt" else mean_over_tokens,
        callbacks=[RunningStatisticsCallback(sync=sync)],
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return whole(model)


def in_lightning(folder, kind, *, ranks, fsdp=False, resume=False):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from fairseq_powernorm.integrations.lightning import RunningStatisticsCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build(kind, tied=False)

        def configure_model(self):
            if fsdp:
                for part in [*blocks(self.model), self.model]:
                    fully_shard(part)

        def training_step(self, batch, index):
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return mean_over_tokens(output, batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE)

    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1) if fsdp else "ddp"
    saves = ranks > 1 and not resume
    keep = [ModelCheckpoint(folder, filename="half", every_n_train_steps=HALF, save_top_k=1, monitor=None)] if saves else []
    trainer = lightning.Trainer(
        max_steps=STEPS, accumulate_grad_batches=4 // ranks, logger=False, enable_checkpointing=saves, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, devices=ranks,
        strategy=strategy if ranks > 1 else "auto", callbacks=[RunningStatisticsCallback(), *keep],
        use_distributed_sampler=False,
    )
    module = Module()
    trainer.fit(module, Stream(batches_of(ranks)), ckpt_path=str(folder / "half.ckpt") if resume else None)
    return whole(module.model)


def with_accelerate(folder, kind, *, ranks, fsdp=False, uneven=False, resume=False):
    """``uneven``: the second rank runs out of batches after 9 of 20."""
    from accelerate import Accelerator
    from torch.distributed.algorithms.join import Join

    from fairseq_powernorm.integrations.accelerate import AcceleratedStatistics

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 // ranks)
    if fsdp:
        sharding(accelerator)
    model = build(kind, tied=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    batches = batches_of(ranks)
    if uneven:
        batches = batches[: (20, 9)[dist.get_rank()]]
    half = len(batches) // 2
    if resume:
        accelerator.load_state(str(folder / "half"))
        batches = batches[half:]
    with Join([model, statistics]) if uneven else contextlib.nullcontext():
        for index, batch in enumerate(batches):
            if ranks > 1 and index == half and not (uneven or resume):
                accelerator.save_state(str(folder / "half"))
            with accelerator.accumulate(model), statistics.batch():
                output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                accelerator.backward(mean_over_tokens(output, batch["labels"]))
                optimizer.step()
                optimizer.zero_grad()
    statistics.release()
    return whole(model)


def refused(folder):
    """Messages of what two ranks must not do, by name."""
    from accelerate import Accelerator
    from torch.distributed.algorithms.join import Join

    from fairseq_powernorm.integrations.accelerate import AcceleratedStatistics

    def message(call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return str(error)

    found = {"transformers": message(lambda: hugging_face(folder, "gpt", ranks=RANKS, sync="off"))}
    accelerator = Accelerator(cpu=True)
    model = build("gpt")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    found["accelerate"] = message(lambda: AcceleratedStatistics(accelerator, model, optimizer, sync="off"))
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    for name, joined in (("alone", [model]), ("order", [statistics, model])):
        Join(joined)
        found[name] = message(statistics.batch().__enter__)
        Join([model, statistics], enable=False)
    statistics.release()
    statistics = AcceleratedStatistics(accelerator, model, optimizer, sync="exact")
    found["exact"] = message(lambda: Join([model, statistics]))
    statistics.release()
    return found


TRAINERS = {"hugging_face": hugging_face, "lightning": in_lightning, "accelerate": with_accelerate}
#: trainer, model, sharded?
CASES = [
    ("hugging_face", "bert", False), ("hugging_face", "gpt", False), ("hugging_face", "bert", True),
    ("lightning", "gpt", False), ("lightning", "bert", True),
    ("accelerate", "gpt", False), ("accelerate", "bert", True),
]  # fmt: skip


# ---------------------------------------------------------------- the processes


def work(rank, folder, port):
    """One of the two ranks, in which trainers find themselves as ``torchrun`` leaves them."""
    sys.path.insert(0, os.path.dirname(__file__))
    forget()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), GROUP_RANK="0", TORCHELASTIC_RUN_ID="1",
    )
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    found = {}
    for name, kind, fsdp in CASES:
        place = folder / f"{name} {kind} {fsdp}"
        found[name, kind, fsdp] = TRAINERS[name](place, kind, ranks=RANKS, fsdp=fsdp)
        forget()
        found[name, kind, fsdp, "resumed"] = TRAINERS[name](place, kind, ranks=RANKS, fsdp=fsdp, resume=True)
        forget()
    found["uneven"] = with_accelerate(folder, "gpt", ranks=RANKS, uneven=True)
    forget()
    found["refused"] = refused(folder)
    forget()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def forget():
    """accelerate's state is one for the process: the next trainer begins with a new one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank has written down."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a fork has everything loaded already, but CUDA does not survive it
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(work, (folder, port), RANKS, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process computes with all micro-batches, by trainer and model."""
    return {
        (name, kind): TRAINERS[name](tmp_path_factory.mktemp("alone"), kind, ranks=1)
        for name, kind in sorted({case[:2] for case in CASES})
    }


@pytest.mark.parametrize("name, kind, fsdp", CASES)
def test_two_ranks_equal_one(name, kind, fsdp, found, alone):
    """10 steps on two ranks, with DDP and with FSDP2: parameters and statistics of one process, the same on both ranks."""
    one, other = (each[name, kind, fsdp] for each in found)
    assert_same(one, other)
    assert_same(one, alone[name, kind], rtol=1e-5, atol=1e-7)
    assert {int(value) for key, value in one.items() if key.endswith("iters")} == {STEPS}


@pytest.mark.parametrize("name, kind, fsdp", CASES)
def test_resuming(name, kind, fsdp, found):
    """A checkpoint of two ranks in the middle of an epoch, DDP or FSDP2, and the other half of the steps: the same bits."""
    for each in found:
        assert_same(each[name, kind, fsdp, "resumed"], each[name, kind, fsdp])


def test_ranks_with_unequal_numbers_of_batches(found):
    """In a ``Join`` the first rank goes on alone when the second has no batch left: 10 steps, and the same model on both."""
    one, other = (each["uneven"] for each in found)
    assert_same(one, other)
    assert {int(value) for key, value in one.items() if key.endswith("iters")} == {10}


def test_wrong_use_among_ranks(found):
    """Statistics of each rank's own that DDP would overwrite, and ways to join ranks in which they would wait for ever."""
    for messages in (each["refused"] for each in found):
        for name in ("transformers", "accelerate"):
            assert "sync='off' keeps the statistics of each process, but DDP would overwrite them" in messages[name]
        for name in ("alone", "order"):
            assert "join both, the model first, as in accelerator.join_uneven_inputs([model, statistics])" in messages[name]
        assert "sync='exact' needs a batch on each rank; must be step or off in a Join" in messages["exact"]
