"""Small models and data for the tests."""
import contextlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import warm
from fairseq import models, options
from fairseq.data import Dictionary

import fairseq_powernorm  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAD = 1
SIZES = dict(
    encoder_layers=2, decoder_layers=2, encoder_embed_dim=16, decoder_embed_dim=16, encoder_ffn_embed_dim=32,
    decoder_ffn_embed_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0,
)
ALL_POWER = dict(
    encoder_norm_self="power", encoder_norm_ff="power", decoder_norm_self="power", decoder_norm_ff="power"
)


def task(symbols=20):
    """What a model needs of a task: a joined dictionary, or a language model's."""
    dictionary = Dictionary()
    for i in range(symbols):
        dictionary.add_symbol(f"w{i}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def build(arch="transformer_pn_iwslt_de_en", seed=1, randomize=True, sizes=SIZES, task_symbols=20, **options):
    """A small model, its norms' parameters and running statistics away from their initial values."""
    torch.manual_seed(seed)
    options = {**sizes, "norm_total_updates": 1, **options}
    model = models.build_model(Namespace(_name=arch, **options), task(task_symbols))
    if randomize:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if "layer_norm" in name and not name.endswith("iters"):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def batch(extra_padding=0, seed=0):
    """A left-padded source and a right-padded target with ragged lengths; padding can be made wider."""
    generator = torch.Generator().manual_seed(seed)
    source_lengths, target_lengths = [7, 4, 2], [3, 6, 5]
    source = torch.full((3, max(source_lengths) + extra_padding), PAD)
    target = torch.full((3, max(target_lengths) + extra_padding), PAD)
    for row, (s, t) in enumerate(zip(source_lengths, target_lengths)):
        source[row, -s:] = torch.randint(4, 24, (s,), generator=generator)
        target[row, :t] = torch.randint(4, 24, (t,), generator=generator)
    return source, torch.tensor(source_lengths), target


def command(*words, cwd=None, check=True, timeout=300, stdin=None, cold=False, **environment):
    """Run a command of this Python's environment, in the repository's root unless ``cwd`` says otherwise.

    ``cold``: load everything anew, see :mod:`warm`; a command with a ``PYTHONPATH`` of its own always does.
    Returns the finished process with its output as text; fails the test if its exit status is not 0 and ``check``.
    """
    words = [str(word) for word in words]
    folder = os.path.dirname(sys.executable if cold or "PYTHONPATH" in environment else warm.program("python"))
    program = os.path.join(folder, words[0])
    if os.path.exists(program):
        words[0] = program
    done = subprocess.run(
        words, cwd=cwd or ROOT, input=stdin, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **environment},
    )
    if check:
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def on_ranks(number, *words, check=True, timeout=300, **environment):
    """``fairseq-train`` in so many processes, which gloo joins; each knows ``RANK`` and ``WORLD_SIZE``, as from torchrun.

    Returns what :func:`command` returns: the worst exit status, and the output of all in ``stdout``.
    """
    words = [str(word) for word in words]
    words += [] if "--ddp-backend" in words else ["--ddp-backend", "legacy_ddp"]
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w+") as log:
        words = [
            warm.program("fairseq-train"), *words, "--distributed-world-size", str(number), "--distributed-no-spawn",
            "--distributed-backend", "gloo", "--distributed-init-method", f"file://{folder}/store", "--distributed-rank",
        ]  # fmt: skip
        ranks = [
            subprocess.Popen(
                [*words, str(rank)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **environment, "RANK": str(rank), "WORLD_SIZE": str(number)},
            )
            for rank in range(number)
        ]

        def end(rank):
            """Wait for a rank; where one has failed, the others do not wait for it for ever."""
            status = rank.wait(timeout)
            for other in ranks if status else ():
                try:
                    other.wait(20)
                except subprocess.TimeoutExpired:
                    other.kill()
            return abs(status)

        try:
            with ThreadPoolExecutor(number) as pool:
                status = max(pool.map(end, ranks))
        finally:
            for rank in ranks:
                rank.kill()
        log.seek(0)
        done = subprocess.CompletedProcess(words, status, log.read(), "")
    if check:
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-8000:]}"
    return done


def preprocess(*words):
    """fairseq-preprocess in this process; the log that it keeps in its folder ends with it."""
    from fairseq_cli import preprocess as program

    before = list(logging.root.handlers)
    try:
        program.main(options.get_preprocessing_parser().parse_args([str(word) for word in words]))
    finally:
        for handler in set(logging.root.handlers) - set(before):
            logging.root.removeHandler(handler)
            handler.close()


@contextlib.contextmanager
def counted_calls(modules):
    """Count the forward calls of modules: yields {name: calls}."""
    calls = {name: 0 for name, _ in modules}
    handles = []
    for name, module in modules:
        def hook(_module, _inputs, _output, name=name):
            calls[name] += 1
        handles.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def losses(output):
    """num_updates -> training loss, from the output of fairseq-train or fairseq-hydra-train with a JSON log."""
    rows = (json.loads(line[line.index("{") :]) for line in output.splitlines() if '"num_updates"' in line)
    return {int(row["num_updates"]): row["loss"] for row in rows if "loss" in row}
