"""Exports a trained model, with its norms folded, to run without fairseq and without this package.

``python -m fairseq_powernorm.export CHECKPOINT --format torchscript --output FILE``
``python -m fairseq_powernorm.export CHECKPOINT --format onnx --output FILE``

A TorchScript file is read by ``torch.jit.load``: the scripted model, called as fairseq calls it, with ``encoder`` and
``decoder`` (of a language model ``decoder``) and their incremental decoding. An ONNX file computes log-probabilities
(``B x T x V``) of the next token from ``prev_output_tokens`` (``B x T``) and, in translation, ``src_tokens``
(``B x S``), of any size up to the model's limits. The exported model is run, and its output compared, before the file
appears.
"""
import argparse
import copy
import sys
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from . import checkpoint, command_line, command_options
from .fold import fold_norms

#: largest difference between log-probabilities of file and model, relative to the largest of them (at least 1)
TOLERANCE = 1e-4
#: what torch's exporter without data-dependent control flow supports
OPSET = 17

Inputs = Dict[str, Tensor]
#: a model of fairseq, whose parts no type names
Model = Any


class LanguageModel(nn.Module):
    """A language model of fairseq, whose own ``forward`` cannot be scripted: ``forward(src_tokens)``, ``B x T``."""

    def __init__(self, model: Model):
        super().__init__()
        self.decoder = model.decoder
        self.train(model.training)

    def forward(self, src_tokens: Tensor):
        return self.decoder(src_tokens)

    @torch.jit.export
    def get_normalized_probs(
        self,
        net_output: Tuple[Tensor, Optional[Dict[str, List[Optional[Tensor]]]]],
        log_probs: bool,
        sample: Optional[Dict[str, Tensor]] = None,
    ):
        """See fairseq."""
        return self.decoder.get_normalized_probs(net_output, log_probs, sample)


class LogProbabilities(nn.Module):
    """Log-probabilities of the next token: what an ONNX file computes."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, prev_output_tokens: Tensor, src_tokens: Optional[Tensor] = None) -> Tensor:
        """``B x T`` and, in translation, ``B x S`` -> ``B x T x V``."""
        if src_tokens is None:
            output = self.model(prev_output_tokens)
        else:
            output = self.model(src_tokens, src_tokens.ne(self.model.encoder.padding_idx).sum(1), prev_output_tokens)
        return self.model.get_normalized_probs((output[0], None), log_probs=True)


def scriptable(model: Model) -> nn.Module:
    """The model as ``torch.jit.script``, and fairseq's scripted ``SequenceGenerator``, can take it: folded."""
    fold_norms(model)
    return model if hasattr(model, "encoder") else LanguageModel(model)


def check_model(model: Model) -> None:
    """Raise ValueError for a model that is not made for sequences of any length, or whose softmax is not one."""
    decoder: Any = getattr(model, "decoder", None)
    for part in (decoder.embed_tokens, decoder.adaptive_softmax) if hasattr(decoder, "adaptive_softmax") else ():
        if type(part).__name__ in ("AdaptiveInput", "AdaptiveSoftmax"):
            raise ValueError("the checkpoint's model has adaptive inputs or softmax: such models cannot be exported")
    if not hasattr(decoder, "buffered_future_mask") or hasattr(decoder, "window"):
        raise ValueError(
            f"the checkpoint's model is {type(model).__name__}: must be one of transformer_pn, transformer_lm_pn, or "
            "of fairseq's own that these are made from"
        )


def examples(model: Model) -> List[Inputs]:
    """Batches of random tokens, by name: several sizes, with and without padding."""
    decoder = model.decoder
    draw = torch.Generator().manual_seed(1)
    found = []
    for batch, source, target, padding in ((3, 5, 4, 1), (2, 3, 9, 0), (1, 1, 1, 0)):
        inputs = {}
        for name, part, length in (("prev_output_tokens", decoder, target), ("src_tokens", None, source)):
            part = part or getattr(model, "encoder", None)
            if part is None:
                continue
            length = min(length, part.max_positions())
            words = part.padding_idx + 1, part.embed_tokens.num_embeddings
            tokens = torch.randint(*words, (batch, length), generator=draw)
            if padding and length > padding:
                tokens[0, -padding:] = part.padding_idx
            inputs[name] = tokens
        found.append(inputs)
    return found


def to_torchscript(model: Model, path: str) -> Callable[[Inputs], Tensor]:
    """Write a model as TorchScript; returns a function that runs the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting itself is deprecated
        with open(path, "wb") as stream:
            torch.jit.save(torch.jit.script(scriptable(model)), stream)
        loaded = torch.jit.load(path)
    padding = model.decoder.padding_idx

    def run(inputs: Inputs) -> Tensor:
        words = inputs["prev_output_tokens"]
        source = inputs.get("src_tokens")
        output = loaded(words) if source is None else loaded(source, source.ne(padding).sum(1), words)
        return loaded.get_normalized_probs(output, log_probs=True)

    return run


def to_onnx(model: Model, path: str) -> Callable[[Inputs], Tensor]:
    """Write a model as ONNX; returns a function that runs the file."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--format onnx: {error}; install with: pip install onnx onnxruntime") from error
    fold_norms(model)
    model.prepare_for_onnx_export_()
    decoder, longest = model.decoder, model.decoder.max_positions()
    # fairseq's mask of later positions grows with the longest input: what is traced has to hold the longest there is
    decoder._future_mask = torch.full((longest, longest), float("-inf")).triu(1)
    inputs = examples(model)[0]
    axes = {"prev_output_tokens": "target", "src_tokens": "source", "log_probabilities": "target"}
    exporter: Dict[str, Any] = {"dynamo": False} if "dynamo" in torch.onnx.export.__code__.co_varnames else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # branches on padding: the example has some
        torch.onnx.export(
            LogProbabilities(model), tuple(inputs.values()), path, opset_version=OPSET, input_names=list(inputs),
            output_names=["log_probabilities"],
            dynamic_axes={name: {0: "batch", 1: axes[name]} for name in (*inputs, "log_probabilities")},
            **exporter,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {name: each.numpy() for name, each in inputs.items()})[0])


FORMATS = {"torchscript": to_torchscript, "onnx": to_onnx}


@torch.no_grad()
def export(model: Model, format: str, path: str, overwrite: bool = False) -> float:
    """Fold a copy of a model and write it, whole or not at all.

    Args:
        model: an encoder-decoder or a language model, on the CPU, in float32
        format: a key of :data:`FORMATS`
        path: the file
        overwrite: replace the file if it exists

    Returns:
        largest difference of log-probabilities between model and file on a few random batches

    Raises:
        ValueError: the format is unknown, the file exists or cannot be written, the model cannot be exported, or the file
            computes others
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    checkpoint.check_output(path, overwrite)
    check_model(model)
    model = copy.deepcopy(model).eval()
    expected = [LogProbabilities(model)(**inputs) for inputs in examples(model)]
    batches = examples(model)
    with checkpoint.whole_file(path, overwrite) as temporary:
        run = FORMATS[format](model, temporary)
        difference = max(float((run(inputs) - each).abs().max()) for inputs, each in zip(batches, expected))
        largest = max(float(each.abs().max()) for each in expected)
        if not difference <= TOLERANCE * max(1.0, largest):
            raise ValueError(f"log-probabilities of the exported model differ by {difference:.1e}: nothing is written")
    return difference


def _load(path: str, data: Optional[str]) -> nn.Module:
    """The model of a checkpoint; raises ValueError."""
    from . import register  # noqa: F401

    overrides = {} if data is None else {"data": data}
    try:
        models, _ = checkpoint.read_by_fairseq(path, overrides)
    except ValueError as error:
        if data is None and str(error).startswith("data "):
            raise ValueError(f"{error}; the checkpoint names it, --data names another") from error
        raise
    return models[0]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.export", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a trained model")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="what kind of file to write")
    command_options.add(parser, "--output", required=True)
    parser.add_argument("--data", metavar="DATA-BIN", help="directory with the dictionaries (default: that of the training)")
    command_options.add(parser, "--force")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Command line; returns the exit status."""
    words = parser()
    options = words.parse_args(argv)
    try:
        checkpoint.check_output(options.output, options.force)
        difference = export(
            _load(options.checkpoint, options.data), options.format, options.output, overwrite=options.force
        )
    except ValueError as error:
        print(f"{words.prog}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}: log-probabilities within {difference:.1e} of the checkpoint's")
    return 0


if __name__ == "__main__":
    command_line.run(main)
