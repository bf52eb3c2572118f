"""The examples of fairseq_powernorm/README.md in Python: each runs as it stands."""
import pathlib
import re

import pytest

from fairseq_powernorm.norms import RunningNorm

TEXT = (pathlib.Path(__file__).parents[2] / "fairseq_powernorm" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
#: words of an example -> the package that it needs
PACKAGES = {"transformers": "from transformers", "lightning": "import lightning", "accelerate": "from accelerate"}


def test_there_are_some():
    """Plain PyTorch, Hugging Face and Lightning have an example each."""
    assert len(BLOCKS) >= 6 and all(any(words in block for block in BLOCKS) for words in list(PACKAGES.values())[:2])


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_it_runs(number, tmp_path, monkeypatch):
    """It ends without an error, and the norms of its model, if it names one, have taken a step."""
    for package, words in PACKAGES.items():
        if words in BLOCKS[number]:
            pytest.importorskip(package, reason=f"{package} is not installed: the extra is integrations")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(BLOCKS[number], names)
    norms = [norm for norm in names["model"].modules() if isinstance(norm, RunningNorm)] if "model" in names else []
    assert ("model" in names) == bool(norms)
    if "recalibrate" not in BLOCKS[number]:
        assert all(float(norm.iters) >= 1 for norm in norms)
