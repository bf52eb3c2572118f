"""A user-dir for tests: the package, with a run's inner life written down and accidents on demand.

Environment variables, all optional:
    WATCH: directory in which each rank leaves ``rank0.pt``, ...: an entry per training step, see :class:`Watch`
    INJECT_NAN, INJECT_INF: numbers of training steps, counted from 1 (``3,4``), in which embeddings are NaN, the
        gradient of the decoder's output is infinite
    INJECT_RANK: on this rank only

On a CPU, fairseq's ``pytorch_ddp``, its loss scale of ``--amp`` and its handling of an overflow are mended: all of
them call CUDA.
"""
import atexit
import collections
import functools
import os

import torch
import torch.distributed as dist

import fairseq_powernorm  # noqa: F401

# isort: split
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer

RANK = int(os.environ.get("RANK", 0))
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "barrier")


class Watch:
    """What happened in each training step.

    ``update`` (number of updates after it), ``sentences`` (of each micro-batch, without dummy batches), ``runs``
    (forward passes of each layer, recomputation not counted), ``collectives`` (calls by name), ``state`` (all
    parameters and buffers after it), ``loss_scale`` (during it).
    """

    def __init__(self):
        self.entries, self.step = [], 0
        self.runs, self.collectives = collections.Counter(), collections.Counter()

    def due(self, accident):
        """Does the accident happen in this step?"""
        here = int(os.environ.get("INJECT_RANK", RANK)) == RANK
        return here and str(self.step) in os.environ.get(accident, "").split(",")

    def observe(self, model):
        """Hook into a model when its training begins."""
        for name, module in model.named_modules():
            name = name.replace("module.", "")
            if name.rpartition(".")[0].endswith("layers"):
                module.register_forward_hook(lambda *_, name=name: self.runs.update([name]))

        def lose(_module, _inputs, output):
            return output * float("nan") if self.due("INJECT_NAN") else None

        def strike(_module, _inputs, output):
            if self.due("INJECT_INF") and output[0].requires_grad:
                output[0].register_hook(lambda grad: torch.full_like(grad, float("inf")))

        getattr(model, "encoder", model.decoder).embed_tokens.register_forward_hook(lose)
        model.decoder.register_forward_hook(strike)

    def train_step(self, trainer, samples, *arguments, **options):
        if not self.step:
            self.observe(trainer.get_model())
        self.step += 1
        self.runs.clear(), self.collectives.clear()
        scaler = getattr(trainer.optimizer, "scaler", None)
        scale = scaler.get_scale() if hasattr(scaler, "get_scale") else getattr(scaler, "loss_scale", None)
        done = train_step(trainer, samples, *arguments, **options)
        self.entries.append(dict(
            update=trainer.get_num_updates(), loss_scale=scale,
            runs=dict(self.runs), collectives=dict(self.collectives),
            sentences=[sample["id"].tolist() for sample in samples if sample],
            state={name: value.clone() for name, value in trainer.get_model().state_dict().items()},
        ))
        return done


def counted(name, function):
    def call(*arguments, **options):
        watch.collectives[name] += 1
        return function(*arguments, **options)
    return call


watch = Watch()
train_step = Trainer.train_step
Trainer.train_step = lambda *arguments, **options: watch.train_step(*arguments, **options)
for name in COLLECTIVES:
    setattr(dist, name, counted(name, getattr(dist, name)))
if "WATCH" in os.environ:
    atexit.register(lambda: torch.save(watch.entries, os.path.join(os.environ["WATCH"], f"rank{RANK}.pt")))
if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.cuda.amp.GradScaler = functools.partial(torch.amp.GradScaler, "cpu")
    parallel = distributed_fairseq_model.DistributedDataParallel
    distributed_fairseq_model.DistributedDataParallel = lambda device_ids, output_device, **options: parallel(**options)
