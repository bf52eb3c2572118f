"""The README's table of norms and trainers: every norm of the registry in each of the trainers."""
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")
pytest.importorskip("lightning", reason="lightning is not installed: the extra is integrations")

import lightning
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

from fairseq_powernorm.integrations import hugging_face as of_hugging_face, lightning as of_lightning
from fairseq_powernorm.integrations.accelerate import AcceleratedStatistics
from fairseq_powernorm.norms import NORMS, RunningNorm, build_norm

C, ROWS, STEPS = 8, 16, 2
#: micro-batches of a step, and rows of each
CUTS = {"one": (1, ROWS), "four": (4, ROWS // 4)}


class Model(lightning.LightningModule):
    """Every norm reads the same rows; a model of all three trainers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(C, C)
        self.norms = nn.ModuleDict(
            {name: build_norm(name, C, **getattr(kind, "REQUIRED", {})) for name, kind in NORMS.items()}
        )
        self.double()

    def forward(self, x):
        u = self.linear(x)
        return {"loss": sum(norm(u).pow(3).mean() for norm in self.norms.values())}

    def training_step(self, batch, index):
        return self(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.linear.parameters(), 0.0)  # each step sees the same weights


def data():
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(C, generator=draw, dtype=torch.float64)} for _ in range(STEPS * ROWS)]


def hugging_face(folder, model, count, size):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=STEPS,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3,
        remove_unused_columns=False,
    )
    optimizers = (model.configure_optimizers(), None)
    callbacks = [of_hugging_face.RunningStatisticsCallback()]
    Trainer(model, arguments, train_dataset=data(), callbacks=callbacks, optimizers=optimizers).train()


def in_lightning(folder, model, count, size):
    trainer = lightning.Trainer(
        max_steps=STEPS, accumulate_grad_batches=count, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[of_lightning.RunningStatisticsCallback()],
    )
    trainer.fit(model, torch.utils.data.DataLoader(data(), batch_size=size))


def with_accelerate(folder, model, count, size):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count)
    loader = torch.utils.data.DataLoader(data(), batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, model.configure_optimizers(), loader)
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    for batch in loader:
        with accelerator.accumulate(model), statistics.batch():
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    statistics.release()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [hugging_face, in_lightning, with_accelerate])
def test_one_step_of_the_statistics_with_each_of_the_optimizer(train, tmp_path):
    """Two steps of four micro-batches and of one batch: every norm with running statistics has taken two, and those of the
    forward pass are the same, over all rows of a step.
    """
    models = {}
    for name, cut in CUTS.items():
        models[name] = Model()
        train(tmp_path, models[name], *cut)
    for name, norm in models["four"].norms.items():
        if isinstance(norm, RunningNorm):
            other = dict(models["one"].norms[name].named_buffers())
            assert int(norm.iters) == STEPS
            for buffer, value in norm.named_buffers():
                if not buffer.endswith("gz"):  # of the backward pass
                    torch.testing.assert_close(
                        value, other[buffer], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
                    )
