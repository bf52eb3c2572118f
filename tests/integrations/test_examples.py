"""The examples in the texts of the integrations, as they stand."""
import importlib
import inspect
import re
import textwrap

import loadable  # noqa: F401
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")
pytest.importorskip("accelerate", reason="accelerate is not installed: the extra is integrations")
pytest.importorskip("lightning", reason="lightning is not installed: the extra is integrations")

from small_models import steps
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
