"""Whole models to time: a Transformer with each norm, its sentences, its optimizers."""
from argparse import Namespace
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim import FP16Optimizer
from fairseq.optim.adam import FairseqAdamConfig
from omegaconf import OmegaConf
from torch import Tensor, nn

import fairseq_powernorm.register  # noqa: F401
from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.statistics import RunningStatistics

from .authors_norm import AuthorsPowerNorm
from .contenders import on_kernel
from .timing import Measure, clock, device_clock


def translation_model(
    norm: str, options: Namespace, d: int, ffn: int, layers: int, symbols: int
) -> Tuple[Any, RunningStatistics, Any]:
    """A Transformer with the given norm everywhere, and what counts its statistics."""
    dictionary = Dictionary()
    for i in range(symbols):
        dictionary.add_symbol(f"w{i}")
    kind = "power" if norm in ("power-torch", "authors") else norm
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             dict(layers=layers, embed_dim=d, ffn_embed_dim=ffn, attention_heads=4).items()}
    places = {f"{side}_norm_{place}": kind for side in ("encoder", "decoder") for place in ("self", "ff")}
    torch.manual_seed(1)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model: Any = models.build_model(Namespace(
        _name="transformer_pn_iwslt_de_en", **sizes, **places, dropout=0.0, norm_warmup_updates=0,
        share_all_embeddings=True), task)
    if norm == "authors":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, PowerNorm):
                    theirs: Any = AuthorsPowerNorm(child.dim, groups=child.groups)
                    theirs.forward = (lambda x, mask=None, slot=child.mask_slot, forward=theirs.forward:
                                      forward(x, slot.padding_mask if mask is None and slot is not None else mask))
                    setattr(module, name, theirs)
    model = model.to(options.device, getattr(torch, options.model_dtype))
    return model, RunningStatistics(model), dictionary


def model_measure(options: Namespace) -> Measure:
    """The clock that times whole models."""
    return device_clock if options.device == "cuda" else clock


def sentences(
    options: Namespace, count: int, length: int, symbols: int, generator: torch.Generator
) -> Tuple[Tensor, Tensor, Tensor]:
    """Left-padded source and right-padded target of unequal lengths (pad = 1)."""
    lengths = torch.randint(max(1, length * 2 // 3), length + 1, (count,), generator=generator)
    lengths[0] = length
    source, target = (torch.randint(4, symbols, (count, length), generator=generator) for _ in range(2))
    positions = torch.arange(length)
    source[positions >= lengths.unsqueeze(1)] = 1
    target[positions >= lengths.unsqueeze(1)] = 1
    return source.flip(1).to(options.device), lengths.to(options.device), target.to(options.device)


def model_functions(
    options: Namespace,
    make: Callable[[str], Optional[Callable[[], object]]],
    names: Sequence[str] = ("layer", "rms", "batch", "power", "power-torch", "authors"),
) -> Dict[str, Callable[[], object]]:
    """name -> function for each of these norms that is asked for, and that a whole model can have."""
    functions: Dict[str, Callable[[], object]] = {}
    for name in names:
        if name != "layer" and name not in options.contenders:
            continue
        if name == "authors" and options.model_dtype == "float16":  # its statistics would be float16, too
            continue
        function = make(name)
        if function is None:
            continue
        functions[name] = on_kernel("eager", function) if name == "power-torch" else function
    return functions


class HalfPrecision:
    """Fairseq's own optimizer of --fp16: a float32 copy of the parameters, and a loss scale."""

    def __init__(self, model: nn.Module, *, on_gpu: bool):
        config = OmegaConf.structured(FairseqConfig)
        adam: Any = OmegaConf.to_container(OmegaConf.structured(FairseqAdamConfig))
        config.optimizer = OmegaConf.create({**adam, "lr": [1e-5]})
        config.optimizer._name = "adam"
        config.common.fp16, config.common.fp16_no_flatten_grads = True, not on_gpu
        self.optimizer = FP16Optimizer.build_optimizer(config, [p for p in model.parameters() if p.requires_grad])

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @property
    def scale(self) -> float:
        return float(self.optimizer.scaler.loss_scale)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.backward(loss)

    def step(self) -> None:
        try:
            self.optimizer.clip_grad_norm(1.0)
            self.optimizer.step()
        except OverflowError:  # the scale has been halved
            pass


class SinglePrecision:
    """torch's Adam."""

    scale = 1.0

    def __init__(self, model: nn.Module, *, on_gpu: bool):
        self.clip = torch.nn.utils.clip_grad_norm_
        self.parameters: List[nn.Parameter] = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-5)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.clip(self.parameters, 1.0)
        self.optimizer.step()


class Update:
    """One update of a model on count sentences, called as a function.

    Attributes:
        seconds: of each call, the time that the running statistics took, beside the sums that the norms make
    """

    def __init__(
        self, options: Namespace, model: nn.Module, running: RunningStatistics, count: int, length: int, symbols: int
    ):
        self.model, self.running = model.train(), running
        kind: Any = HalfPrecision if options.model_dtype == "float16" else SinglePrecision
        self.optimizer = kind(model, on_gpu=options.device == "cuda")
        self.sample = sentences(options, count, length, symbols, torch.Generator().manual_seed(1))
        self.seconds: List[float] = []

    def __call__(self) -> None:
        source, lengths, target = self.sample
        self.optimizer.zero_grad()
        batch = self.running.batch(gradient_scale=self.optimizer.scale)
        taken = clock(batch.__enter__)
        logits, _ = self.model(source, lengths, target)
        self.optimizer.backward(torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), target.flatten(), ignore_index=1, label_smoothing=0.1))
        taken += clock(lambda: batch.__exit__(None, None, None))
        taken += clock(self.running.reduce)
        self.optimizer.step()
        taken += clock(self.running.commit)
        self.seconds.append(taken)
