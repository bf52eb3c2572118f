"""When the package loads fairseq, when it registers with it, and what works without it."""
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import subprocess
import sys
from importlib import metadata, util

import pytest
import toy
from fairseq import options as fairseq_options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_powernorm import options, tasks
from fairseq_powernorm.models import tensorized_lm_pn, transformer_lm_pn, transformer_pn

#: at the end of a program: everything is registered, fairseq is patched once, and there is one class of each name
REGISTERED = """
import argparse, torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
import fairseq_powernorm.tasks
from fairseq_powernorm import patches
from fairseq_powernorm.models.transformer_pn import TransformerPNModel
assert {"transformer_pn_tiny", "transformer_lm_pn_ptb", "tensorized_lm_pn_ptb"} <= set(ARCH_MODEL_REGISTRY)
assert MODEL_REGISTRY["transformer_pn"] is TransformerPNModel
assert TASK_REGISTRY["translation_pn"] is fairseq_powernorm.tasks.TranslationPNTask
assert "language_modeling_pn" in TASK_REGISTRY
for owner, name, _ in patches.patches():
    function = getattr(owner, name)
    assert patches.is_replaced(function) and not patches.is_replaced(function.__wrapped__), name
assert argparse.Namespace in torch.serialization.get_safe_globals()
print("registered")
"""


#: of a training run of one update
TINY = (
    "--encoder-layers", 1, "--decoder-layers", 1, "--optimizer", "sgd", "--lr", 0.1, "--max-update", 1, "--max-tokens", 400,
    "--cpu", "--num-workers", 0, "--data-buffer-size", 0, "--disable-validation",
)  # fmt: skip


#: reads programs and runs each in a process of its own, forked before it has imported fairseq: seven times as fast as a new
#: one, which has torch to load
NURSERY = """
import json, os, sys, tempfile, traceback
import hydra, numpy, omegaconf, sacrebleu, sklearn.metrics, torch
assert not {"fairseq", "fairseq_powernorm"} & set(sys.modules)
for line in sys.stdin:
    program, folder = json.loads(line)
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2), os.chdir(folder)
            status = 1
            try:
                exec(program, {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([status, output.read().decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """Run a Python program in a process of its own, in a folder; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(toy.ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:

        def run(program, folder=toy.ROOT):
            print(json.dumps([program, str(folder)]), file=nursery.stdin, flush=True)
            status, output = json.loads(nursery.stdout.readline())
            assert status == 0, f"{program}\n{output}"
            return output

        yield run
        nursery.stdin.close()


# ---------------------------------------------------------------- the norms alone


@pytest.mark.slow
def test_norms_load_torch_and_nothing_else(run):
    """Beside torch's modules and the standard library's, importing the norms loads this package's only, and few of them;
    it changes no logger, warning filter, import hook or list of torch's, and does not load torch's compiler."""
    program = """
import logging, sys, torch, warnings
for name in [name for name in sys.modules if name.split(".")[0] in ("hydra", "omegaconf", "numpy", "sacrebleu", "sklearn")]:
    del sys.modules[name]  # loaded again if it is needed
def state():
    return (logging.root.level, list(logging.root.handlers), list(warnings.filters), list(sys.meta_path), list(sys.path),
            list(sys.path_hooks), torch.serialization.get_safe_globals(), torch.get_default_dtype())
before, modules = state(), set(sys.modules)
from fairseq_powernorm.norms import PowerNorm
assert state() == before
new = {name for name in set(sys.modules) - modules if name.split(".")[0] not in sys.stdlib_module_names}
assert all(name.split(".")[0] == "fairseq_powernorm" for name in new), sorted(new)
assert len(set(sys.modules) - modules) < 0.05 * len(modules), sorted(set(sys.modules) - modules)
x = torch.randn(5, 3, 8, requires_grad=True)
PowerNorm(8)(x).sum().backward()
assert "fairseq" not in sys.modules and "torch._dynamo" not in sys.modules
print(list(x.grad.shape))
"""
    assert "[5, 3, 8]" in run(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fairseq",
    [
        "import sys; sys.modules['fairseq'] = None",  # blocked
        "import sys, types; sys.modules['fairseq'] = types.ModuleType('fairseq')",  # a stub
        "import sys, unittest.mock; sys.modules['fairseq'] = unittest.mock.MagicMock()",  # as documentation builders do
        "import sys; sys.path.insert(0, 'folder'); import fairseq",  # a folder of the name of a checkout
        "import sys; sys.path.insert(0, 'broken')",  # an installation that fails
        "import sys; sys.path.insert(0, 'broken')\ntry: import fairseq\nexcept RuntimeError: pass",
    ],
)
def test_norms_work_where_fairseq_is_missing_or_broken(fairseq, run, tmp_path):
    """A norm, its statistics and folding work whatever goes by the name of fairseq."""
    (tmp_path / "folder" / "fairseq").mkdir(parents=True)
    (tmp_path / "broken" / "fairseq").mkdir(parents=True)
    (tmp_path / "broken" / "fairseq" / "__init__.py").write_text("import json\nraise RuntimeError('broken')\n")
    program = fairseq + """
import torch
from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.statistics import RunningStatistics
from fairseq_powernorm.fold import fold_norms
model = torch.nn.Sequential(torch.nn.Linear(8, 8), PowerNorm(8))
statistics = RunningStatistics(model)
with statistics.batch():
    model(torch.randn(6, 8)).sum().backward()
statistics.commit()
fold_norms(model)(torch.randn(6, 8))
print("worked")
"""
    assert "worked" in run(program, tmp_path)


def needed_by(distribution, found=None):
    """Names of the distributions that a distribution needs, itself included, of those that are installed."""
    found = set() if found is None else found
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return found
    found.add(distribution)
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" not in requirement and name not in found:
            needed_by(name, found)
    return found


@pytest.mark.slow
def test_norms_need_torch_only(tmp_path):
    """Where nothing is installed but torch and what torch needs, as after ``pip install --no-deps``, norms, statistics,
    folding and the kernels' command work; the modules for fairseq say what is missing."""
    for name in sorted(needed_by("torch")):
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(pathlib.Path(metadata.distribution(name).locate_file(top)))
    for missing in ("fairseq", "omegaconf", "numpy", "sacrebleu", "packaging"):
        assert not (tmp_path / missing).exists()
    (tmp_path / "fairseq_powernorm").symlink_to(toy.ROOT / "fairseq_powernorm")
    begin = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    program = begin + """
import torch
from fairseq_powernorm.norms import NORMS, build_norm
from fairseq_powernorm.statistics import RunningStatistics
from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm import functional, kernels
from fairseq_powernorm.kernels.__main__ import main
for name in NORMS:
    text = "prepbn:total_updates=1" if name == "prepbn" else name
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), build_norm(text, 8))
    statistics = RunningStatistics(model)
    with statistics.batch():
        model(torch.randn(6, 8)).sum().backward()
    statistics.commit()
    fold_norms(model)(torch.randn(6, 8))
assert main([]) == 0
for name in ("register", "tasks", "models.transformer_pn"):
    try:
        __import__(f"fairseq_powernorm.{name}")
        raise AssertionError(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cpu   float32" in done.stdout and "No module named" in done.stdout


# ---------------------------------------------------------------- with fairseq


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import fairseq_powernorm.register",
        "import fairseq, fairseq_powernorm",
        "import fairseq, fairseq_powernorm.norms",
        "import fairseq_powernorm.norms, fairseq, fairseq_powernorm.register",
        *(f"import fairseq_powernorm.{name}" for name in ("options", "layers", "tasks", "models.base", "models")),
        "import fairseq_powernorm.norms, fairseq, fairseq_powernorm.models.tensorized_lm_pn",
        "import fairseq, fairseq_powernorm.register as r, importlib; importlib.reload(r); r.patches.apply()",
    ],
)
def test_registration_is_whole(program, run):
    """Whichever module is imported first, fairseq before or after: all models and tasks are registered and fairseq is
    patched, once."""
    assert "registered" in run(program + REGISTERED)


@pytest.mark.slow
@pytest.mark.parametrize("user_dir", [str(toy.ROOT / "fairseq_powernorm"), "fairseq_powernorm"])
@pytest.mark.parametrize(
    "before",
    [
        "",
        "import fairseq_powernorm.norms, fairseq",  # as a script does that uses the norms and then fairseq
        "import fairseq_powernorm.tasks",
    ],
)
def test_user_dir(user_dir, before, run):
    """``--user-dir`` by path and by bare name registers, be the package imported already or not; no module is loaded
    twice.
    """
    program = f"""
import sys
{before}
norms = sys.modules.get("fairseq_powernorm.norms")
from argparse import Namespace
from fairseq import utils
utils.import_user_module(Namespace(user_dir={user_dir!r}))
assert norms is None or norms is sys.modules["fairseq_powernorm.norms"]
"""
    assert "registered" in run(program + REGISTERED)


def test_norms_in_a_model_of_fairseqs_own_folder(run, tmp_path):
    """A model inside fairseq's folder, which fairseq imports while it is being imported itself, may use the norms; then
    ``--user-dir`` registers as ever."""
    real = pathlib.Path(util.find_spec("fairseq").origin).parent
    mine = tmp_path / "fairseq"
    (mine / "models").mkdir(parents=True)
    for path in (*real.iterdir(), *(real / "models").iterdir()):
        if path.name not in ("models", "__pycache__"):
            (mine / path.relative_to(real)).symlink_to(path)
    (mine / "models" / "mine.py").write_text("from fairseq_powernorm.norms import PowerNorm\n")
    program = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(toy.ROOT)!r}]
import fairseq.models.mine
assert fairseq.__file__.startswith({str(tmp_path)!r})
from argparse import Namespace
from fairseq import utils
utils.import_user_module(Namespace(user_dir={str(toy.ROOT / "fairseq_powernorm")!r}))
"""
    assert "registered" in run(program + REGISTERED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration",
    [
        tasks.TranslationPNConfig, transformer_pn.TransformerPNConfig, transformer_lm_pn.TransformerLMPNConfig,
        tensorized_lm_pn.TensorizedLMPNConfig, options.NormOptions,
    ],
)  # fmt: skip
def test_pickled_configurations(configuration, run, tmp_path):
    """A pickled configuration is read by a process that has imported nothing: the same values, and all is registered."""
    (tmp_path / "pickled").write_bytes(pickle.dumps(configuration()))
    program = """
import pickle
with open("pickled", "rb") as stream:
    config = pickle.load(stream)
print(repr(config))
"""
    output = run(program + REGISTERED, tmp_path)
    assert repr(configuration()) in output and "registered" in output


WORKER = """
def work(cfg):
    from fairseq.distributed import utils
    from fairseq_cli.train import main
    utils.distributed_main(0, main, cfg, {})
"""


@pytest.mark.slow
def test_spawned_processes(toy_data, tmp_path, monkeypatch):
    """A process that is spawned, not forked, as fairseq does for the GPUs of a machine, and has imported nothing but its
    configuration, trains a model together with another one."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    import worker

    words = [str(word) for word in (
        toy_data, "--user-dir", toy.ROOT / "fairseq_powernorm", "--task", "translation_pn", "--arch",
        "transformer_pn_tiny", *TINY, "--save-dir", tmp_path / "run", "--distributed-world-size", 2,
        "--distributed-init-method", f"file://{tmp_path}/store", "--distributed-backend", "gloo", "--ddp-backend",
        "legacy_ddp", "--distributed-no-spawn", "--distributed-rank",
    )]  # fmt: skip
    cfg = convert_namespace_to_omegaconf(
        fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser(), [*words, "0"])
    )
    spawned = multiprocessing.get_context("spawn").Process(target=worker.work, args=(cfg,), daemon=True)
    spawned.start()
    toy.command("fairseq-train", *words, 1)
    spawned.join(60)
    assert spawned.exitcode == 0
    assert (tmp_path / "run" / "checkpoint_last.pt").is_file()


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory):
    """Folder of a model after one update."""
    folder = tmp_path_factory.mktemp("trained")
    toy.command(
        "fairseq-train", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--arch",
        "transformer_pn_tiny", *TINY, "--save-dir", folder,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "from fairseq_powernorm.models.transformer_pn import TransformerPNModel as Model; options = {}",
        "from fairseq.models.transformer import TransformerModel as Model; "
        f"options = dict(user_dir={str(toy.ROOT / 'fairseq_powernorm')!r})",
    ],
)
def test_loading_from_python(model, run, toy_data, trained):
    """``from_pretrained``, of the model's class and of fairseq's with a ``user_dir``, after the norms have been imported."""
    program = f"""
from fairseq_powernorm.norms import PowerNorm
{model}
hub = Model.from_pretrained({str(trained)!r}, "checkpoint_last.pt", {str(toy_data)!r}, tokenizer=None, bpe=None, **options)
assert type(hub.models[0]).__name__ == "TransformerPNModel"
print("translated", len(hub.translate("d1 d2 d3")))
"""
    assert "translated" in run(program)


@pytest.mark.slow
@pytest.mark.parametrize("read", ["checkpoint.load(path)['model']", "resume.num_updates(path)"])
def test_reading_a_checkpoint_without_registration(read, run, trained):
    """What reads checkpoints allows torch to read fairseq's by itself."""
    path = str(trained / "checkpoint_last.pt")
    assert "read" in run(f"from fairseq_powernorm import checkpoint, resume\npath = {path!r}\nassert {read}\nprint('read')")


@pytest.mark.parametrize("module", ["checkpoint", "export", "recalibrate", "recorder", "kernels"])
def test_commands_start_without_fairseq(module, run):
    """``python -m fairseq_powernorm.MODULE --help`` answers without loading fairseq."""
    program = f"""
import runpy, sys
sys.argv = ["{module}", "--help"]
try:
    runpy.run_module("fairseq_powernorm.{module}", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "fairseq" not in sys.modules
"""
    assert f"fairseq_powernorm.{module}" in run(program)


def test_patches_are_applied_once(run):
    """However often patches are applied, also by a second copy of their module, a function is replaced once, by one that
    calls what stood there; a static method stays one."""
    program = """
import importlib, sys
from fairseq_powernorm import patches
class Class:
    def method(self, number): return number
    @staticmethod
    def static(number): return number
def replacement(original, *arguments):
    return original(*arguments) + 1
for _ in range(2):
    for name in ("method", "static"):
        patches.replace(Class, name, replacement)
    del sys.modules["fairseq_powernorm.patches"]
    patches = importlib.import_module("fairseq_powernorm.patches")
assert (Class().method(1), Class().static(1), Class.static(1)) == (2, 2, 2)
print("once")
"""
    assert "once" in run(program)


@pytest.mark.slow
def test_patches_are_on_classes(run, toy_data, tmp_path):
    """Training changes classes and modules of fairseq, no object: an optimizer has no function of its own afterwards, and is
    pickled."""
    words = [str(word) for word in (
        "fairseq-train", toy_data, "--user-dir", toy.ROOT / "fairseq_powernorm", "--task", "translation_pn", "--arch",
        "transformer_pn_tiny", *TINY, "--save-dir", tmp_path,
    )]  # fmt: skip
    program = f"""
import inspect, pickle, sys
import fairseq_powernorm.register
from fairseq_cli import train
from fairseq_powernorm import patches
assert all(inspect.isclass(owner) or inspect.ismodule(owner) for owner, _, _ in patches.patches())
trainers = []
class Trainer(train.Trainer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        trainers.append(self)
train.Trainer = Trainer
sys.argv = {words!r}
train.cli_main()
for each in (trainers[0], trainers[0].optimizer, trainers[0].task, trainers[0].model):
    assert not [name for name, value in vars(each).items() if inspect.isroutine(value)], each
pickle.dumps(trainers[0].optimizer)
print("on classes")
"""
    assert "on classes" in run(program)
