"""``transformer_pn``: fairseq's Transformer for translation with a choice of norms.

Options are flat, as on the command line and in YAML files. Sizes that are not given come from the architecture
function, norm options from :mod:`fairseq_powernorm.options`.
"""
from argparse import Namespace
from dataclasses import field, fields, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
    transformer_legacy,
)
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig, QuantNoiseConfig
from omegaconf import DictConfig, OmegaConf

from ..checkpoint import check_same_norms
from ..layers import DecoderLayer, EncoderLayer, swap_norm, wrap_layer
from ..norms import MaskSlot
from ..options import NORM_FIELDS, NormOptions, check_norms, norm_options, reject_unknown, reject_unknown_flags


def _flat_transformer_config():
    """Fields of fairseq's TransformerConfig without nesting; those that architectures set are None by default."""
    nested = {"encoder": EncDecBaseConfig, "decoder": DecoderConfig, "quant_noise": QuantNoiseConfig}
    by_architecture = Namespace()
    transformer_legacy.base_architecture(by_architecture)
    flat = []
    for outer in fields(TransformerConfig):
        for inner in fields(nested[outer.name]) if outer.name in nested else (outer,):
            if inner.name.startswith("_"):
                continue
            name = f"{outer.name}_{inner.name}" if outer.name in nested else inner.name
            kind = str if name.endswith("_layers_to_keep") else inner.type  # fairseq splits these at commas
            default = None if hasattr(by_architecture, name) else inner.default
            if default is None:
                kind = Optional[kind]
            flat.append((name, kind, field(default=default, metadata=dict(inner.metadata))))
    return flat


TransformerPNConfig = make_dataclass(
    "TransformerPNConfig",
    _flat_transformer_config()
    + [
        ("post_norm", bool, field(default=False, metadata={"help": "norm after each residual block, in all stacks"})),
    ],
    bases=(NormOptions,),
)
TransformerPNConfig.__module__ = __name__


def _given(args: Any) -> dict:
    """The options of a Namespace or DictConfig that have a value."""
    values = OmegaConf.to_container(args, enum_to_str=True) if isinstance(args, DictConfig) else vars(args)
    return {k: v for k, v in values.items() if v is not None}


def register_architecture(name: str):
    """Register ``fn(args)``, which fills in what ``args`` lacks, as an architecture of ``transformer_pn``.

    Works on a command line's Namespace, where options not given are absent, and on a DictConfig (hydra,
    checkpoints), where they are None.
    """

    def register(fn):
        @register_model_architecture("transformer_pn", name)
        def fill(args):
            filled = Namespace(**_given(args))
            fn(filled)
            check_norms(filled)
            for key, value in vars(filled).items():
                setattr(args, key, value)

        return fn

    return register


class PowerNormEncoder(TransformerEncoderBase):
    """fairseq's encoder with the norms of ``cfg.norms``; hands the padding mask to its final norm."""

    def __init__(self, cfg, dictionary, embed_tokens, return_fc=False):
        super().__init__(cfg, dictionary, embed_tokens, return_fc)
        self.mask_slot = MaskSlot()
        swap_norm(
            self, "layer_norm", cfg.norms, "encoder", "final", embed_tokens.embedding_dim, cfg.encoder.attention_heads
        )

    def build_encoder_layer(self, cfg):
        return wrap_layer(EncoderLayer(cfg, return_fc=self.return_fc), cfg)

    def forward(self, src_tokens, *args, **kwargs):
        """See fairseq; ``src_tokens`` is ``B x T``."""
        self.mask_slot.padding_mask = src_tokens.eq(self.padding_idx)
        try:
            return super().forward(src_tokens, *args, **kwargs)
        finally:
            self.mask_slot.padding_mask = None


class PowerNormDecoder(TransformerDecoderBase):
    """fairseq's decoder with the norms of ``cfg.norms``; hands the padding mask to its final norm."""

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.mask_slot = MaskSlot()
        swap_norm(self, "layer_norm", cfg.norms, "decoder", "final", self.embed_dim, cfg.decoder.attention_heads)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return wrap_layer(DecoderLayer(cfg, no_encoder_attn), cfg)

    def extract_features(self, prev_output_tokens, encoder_out=None, incremental_state=None, *args, **kwargs):
        """See fairseq; ``prev_output_tokens`` is ``B x T``, of which incremental decoding uses the last column."""
        tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        self.mask_slot.padding_mask = tokens.eq(self.padding_idx)
        try:
            return super().extract_features(prev_output_tokens, encoder_out, incremental_state, *args, **kwargs)
        finally:
            self.mask_slot.padding_mask = None


@register_model("transformer_pn", dataclass=TransformerPNConfig)
class TransformerPNModel(TransformerModelBase):
    """Transformer (Vaswani et al., 2017) with PN, PN-V, BN, LN or RMSNorm at each norm position.

    Everything fairseq's ``transformer`` does works unchanged: pre- and post-norm, shared embeddings, LayerDrop,
    activation checkpointing, incremental decoding.
    """

    @classmethod
    def add_args(cls, parser):
        """Declare the flat options; defaults are left to the architecture."""
        gen_parser_from_dataclass(parser, TransformerPNConfig(), delete_default=True)
        reject_unknown_flags()

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model from flat options (Namespace or DictConfig).

        Raises:
            ValueError: a norm option is unknown or has an invalid value
        """
        args = Namespace(**_given(cfg))
        reject_unknown(vars(args))
        norms = norm_options(args)
        for name in NORM_FIELDS:
            if hasattr(args, name):
                delattr(args, name)
        transformer_legacy.base_architecture(args)
        check_norms(Namespace(**vars(args), **vars(norms)))
        if getattr(args, "post_norm", False):
            args.encoder_normalize_before = args.decoder_normalize_before = False
        config = TransformerConfig.from_namespace(args)
        config.norms = norms
        return super().build_model(config, task)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """See fairseq; raises ValueError where the checkpoint has another norm than the model."""
        check_same_norms(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return PowerNormEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return PowerNormDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def _fill(args: Namespace, **defaults) -> None:
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _pre_norm(args: Namespace) -> None:
    _fill(args, encoder_normalize_before=True, decoder_normalize_before=True)


@register_architecture("transformer_pn_tiny")
def tiny(args):
    """Transformer-Tiny of Wu et al. (ACL 2021) for Multi30k: 4+4 layers, d=128, FFN 256, 4 heads."""
    _pre_norm(args)
    for side in ("encoder", "decoder"):
        _fill(
            args,
            **{
                f"{side}_layers": 4,
                f"{side}_embed_dim": 128,
                f"{side}_ffn_embed_dim": 256,
                f"{side}_attention_heads": 4,
            },
        )
    _fill(args, dropout=0.3)
    transformer_legacy.base_architecture(args)


@register_architecture("transformer_pn_iwslt_de_en")
# the name under which the authors' code saved its checkpoints
@register_architecture("transformer_iwslt_de_en_v2")
def iwslt_de_en(args):
    """The authors' IWSLT14 De-En model: 6+6 layers, d=512, FFN 1024, 4 heads."""
    _pre_norm(args)
    _fill(args, dropout=0.3, attention_dropout=0.1, activation_dropout=0.1)
    transformer_legacy.transformer_iwslt_de_en(args)


@register_architecture("transformer_pn_wmt_en_de")
def wmt_en_de(args):
    """Transformer-base for WMT14 En-De: 6+6 layers, d=512, FFN 2048, 8 heads."""
    _pre_norm(args)
    transformer_legacy.transformer_wmt_en_de(args)


@register_architecture("transformer_pn_wmt_en_de_big")
def wmt_en_de_big(args):
    """The authors' WMT14 En-De model, Transformer-big: 6+6 layers, d=1024, FFN 4096, 16 heads."""
    _pre_norm(args)
    transformer_legacy.transformer_wmt_en_de_big(args)
