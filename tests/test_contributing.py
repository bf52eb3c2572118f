"""CONTRIBUTING.md: its examples, done as it says, work."""
import re
import subprocess
import sys
import types

import pytest
import toy
from fairseq import models

from fairseq_powernorm import kernels, norm_names
from fairseq_powernorm.experiments import recipes, settings
from fairseq_powernorm.experiments.data.prepare import prepare
from fairseq_powernorm.models import transformer_pn
from fairseq_powernorm.norms import registry

TEXT = (toy.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: path of a file -> the text that is to be written into it
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.S))


def module_of(path, monkeypatch):
    """The module that the file at this path would be."""
    name = path[: -len(".py")].replace("/", ".")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(BLOCKS[path], path, "exec"), vars(module))
    return module


def run_tests(path):
    """Run the test functions of a block; gives how many there were."""
    names = {}
    exec(compile(BLOCKS[path], path, "exec"), names)
    tests = [function for name, function in names.items() if name.startswith("test_")]
    for test in tests:
        assert test.__doc__
        test()
    return len(tests)


def test_every_block_is_run():
    """The Python blocks are those that the tests below run."""
    assert set(BLOCKS) == {
        "fairseq_powernorm/norms/scale.py", "tests/norms/test_scale.py", "fairseq_powernorm/models/transformer_pn.py",
        "tests/models/test_model.py",
        "fairseq_powernorm/kernels/mine.py", "tests/kernels/test_kernels.py",
    }  # fmt: skip
    assert TEXT.count("```python") == len(BLOCKS)


def test_a_norm(monkeypatch):
    """The file and the line make a norm with options, which its test finds; before, it is unknown. Both files are those of
    the package.
    """
    paths = "fairseq_powernorm/norms/scale.py", "tests/norms/test_scale.py"
    assert [BLOCKS[path] for path in paths] == [(toy.ROOT / path).read_text(encoding="utf-8") for path in paths]
    line = '"scale": "scale.ScaleNorm"'
    assert f"`{line}`" in TEXT and f"    {line},\n" in (toy.ROOT / "fairseq_powernorm" / "norm_names.py").read_text()
    monkeypatch.delitem(norm_names.NORM_CLASSES, "scale")
    monkeypatch.setattr(registry, "NORMS", registry.load())
    with pytest.raises(ValueError, match="norm 'scale': must be one of"):
        run_tests(paths[1])
    module = module_of(paths[0], monkeypatch)
    monkeypatch.setitem(norm_names.NORM_CLASSES, "scale", "scale.ScaleNorm")
    monkeypatch.setattr(registry, "NORMS", registry.load())
    assert registry.NORMS["scale"] is module.ScaleNorm
    assert run_tests(paths[1]) == 1


def test_an_architecture():
    """The function, at the end of the model's module, registers an architecture that its test builds."""
    registries = [models.ARCH_MODEL_REGISTRY, models.ARCH_MODEL_NAME_REGISTRY, models.ARCH_CONFIG_REGISTRY]
    before = [dict(each) for each in registries]
    names = [list(each) for each in models.ARCH_MODEL_INV_REGISTRY.values()]
    try:
        exec(BLOCKS["fairseq_powernorm/models/transformer_pn.py"], dict(vars(transformer_pn)))
        assert run_tests("tests/models/test_model.py") == 1
    finally:
        for each, old in zip(registries, before):
            each.clear()
            each.update(old)
        for each, old in zip(models.ARCH_MODEL_INV_REGISTRY.values(), names):
            each[:] = old


def test_a_backend(monkeypatch):
    """The module, entered before eager, serves what it says and passes its test; it offers all that the protocol
    asks for.
    """
    assert '`"mine": mine`' in TEXT
    mine = module_of("fairseq_powernorm/kernels/mine.py", monkeypatch)
    offered = [name for name in vars(kernels.Backend) if not name.startswith("_")]
    assert offered and all(callable(getattr(mine, name)) for name in offered)
    monkeypatch.setattr(kernels, "KERNELS", {"mine": mine, **kernels.KERNELS})
    assert run_tests("tests/kernels/test_kernels.py") == 1


@pytest.mark.slow
def test_a_benchmark(monkeypatch, tmp_path):
    """The two YAML files make a benchmark, whose text is prepared from a folder."""
    (commands,) = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "demo.yaml").write_bytes((recipes.CONFIGS / "demo.yaml").read_bytes())
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path / "configs")
    monkeypatch.setenv("PN_DATA_ROOT", str(tmp_path / "data"))
    text = tmp_path / "text"
    text.mkdir()
    for split, count in (("train", 40), ("valid", 5), ("test", 5)):
        for language, words in (("nl", "een twee drie vier"), ("en", "one two three four")):
            (text / f"{split}.{language}").write_text(f"{words} {words[::-1]} .\n" * count)
    config = settings.load("talks")
    assert (config.task.source_lang, config.model._name) == ("nl", "transformer_pn_iwslt_de_en")
    prepare("talks", text_dir=str(text))
    directory, facts = recipes.prepared("talks")
    assert (directory / "data-bin" / "train.nl-en.nl.bin").is_file() and facts["settings"]["bpe_size"] == 100
