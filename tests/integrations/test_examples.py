"""The examples of the integrations, in their texts and in the README of the package, as they stand."""
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import loadable  # noqa: F401
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")
pytest.importorskip("lightning", reason="lightning is not installed: the extra is integrations")

import lightning
import torch
from small_models import build, sentences, steps
from torch import nn

ROOMS = ("steps", "accelerate", "lightning", "hugging_face")
pytestmark = pytest.mark.filterwarnings("ignore")


def of_docstrings(room):
    """The examples in a module's text and in those of its classes."""
    module = importlib.import_module(f"fairseq_powernorm.integrations.{room}")
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    found = []
    for text in (module.__doc__, *(each.__doc__ or "" for each in own)):
        found += re.findall(r"\.\. code-block:: python\n\n((?: +.*\n|\n)+)", inspect.cleandoc(text) + "\n")
    return [textwrap.dedent(each) for each in found]


@pytest.mark.parametrize("room", ROOMS)
def test_examples_in_docstrings(room, tmp_path, monkeypatch):
    """Each module has one, and it takes one step of the statistics per step of the optimizer, of which it takes 1 or 4."""
    monkeypatch.chdir(tmp_path)
    (example,) = of_docstrings(room)
    names = {"__name__": "example"}
    models, init = [], nn.Module.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        models.append(self)

    monkeypatch.setattr(nn.Module, "__init__", remember)
    exec(compile(example, room, "exec"), names)
    assert set().union(*map(steps, models)) == {1 if room == "steps" else 4}


class Module(lightning.LightningModule):
    """A small model for Lightning."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("number, project", [(0, "transformers"), (1, "lightning"), (2, "accelerate")])
def test_examples_in_the_readme(number, project, tmp_path, monkeypatch):
    """The three blocks of the section on trainers, each with a model and data of its own, take 2 steps of the statistics."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "fairseq_powernorm" / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Trainers") :]
    examples = re.findall(r"```python\n(.*?)```", section[: section.index("\n## ", 1)], re.S)
    assert len(examples) == 3 and project in examples[number]
    model, data = build("gpt"), sentences(16)
    names = dict(
        model=model, examples=data, module=Module(model), optimizer=torch.optim.SGD(model.parameters(), 0.1),
        batches=torch.utils.data.DataLoader(data, batch_size=2),
    )
    exec(examples[number].replace("max_steps=100", "max_steps=2"), names)
    assert steps(model) == {2}
