"""``transformer_pn``: fairseq's Transformer for translation with a choice of norms."""
from argparse import Namespace
from dataclasses import field, make_dataclass
from typing import Any, Dict, List

from fairseq.models import register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
    transformer_legacy,
)
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig, QuantNoiseConfig
from torch import nn

from ..checkpoint import AUTHORS_NORM_OPTIONS, AUTHORS_NORMS
from ..layers import DecoderLayer, EncoderLayer, projections, swap_norm, wrap_layer
from ..norms import MaskSlot
from ..options import NormOptions, flag
from .base import PowerNormModel, fill, flat_fields, register_architecture

TransformerPNConfig = make_dataclass(
    "TransformerPNConfig",
    flat_fields(
        TransformerConfig,
        transformer_legacy.base_architecture,
        nested={"encoder": EncDecBaseConfig, "decoder": DecoderConfig, "quant_noise": QuantNoiseConfig},
    )
    + [
        ("post_norm", bool, field(default=False, metadata={"help": "norm after each residual block, in all stacks"})),
    ],
    bases=(NormOptions,),
)
TransformerPNConfig.__module__ = __name__


class PowerNormEncoder(TransformerEncoderBase):
    """fairseq's encoder with the norms of ``cfg.norms``; hands the padding mask to its final norm."""

    #: fairseq's class, which does the same where no norm needs the mask: after folding
    stock = TransformerEncoderBase

    def __init__(self, cfg, dictionary, embed_tokens, return_fc=False):
        super().__init__(cfg, dictionary, embed_tokens, return_fc)
        self.mask_slot = MaskSlot()
        swap_norm(
            self, "layer_norm", cfg.norms, "encoder", "final", embed_tokens.embedding_dim, cfg.encoder.attention_heads
        )

    def upgrade_state_dict_named(self, state_dict, name):
        """See fairseq, which takes a state without version for an old one and removes the final norm: --store-ema."""
        state_dict.setdefault(f"{name}.version", self.version)
        return super().upgrade_state_dict_named(state_dict, name)

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

    #: fairseq's class, which does the same where no norm needs the mask: after folding
    stock = TransformerDecoderBase

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.mask_slot = MaskSlot()
        swap_norm(self, "layer_norm", cfg.norms, "decoder", "final", self.embed_dim, cfg.decoder.attention_heads)

    def upgrade_state_dict_named(self, state_dict, name):
        """See fairseq, which takes a state without version for an old one and removes the final norm: --store-ema.

        Where embeddings are shared, fairseq adds an output projection, which a model with adaptive softmax does not have.
        """
        state_dict.setdefault(f"{name}.version", self.version)
        state_dict = super().upgrade_state_dict_named(state_dict, name)
        if self.adaptive_softmax is not None:
            state_dict.pop(f"{name}.output_projection.weight", None)
        return state_dict

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return wrap_layer(DecoderLayer(cfg, no_encoder_attn), cfg)

    def norm_readers(self) -> Dict[str, List[nn.Module]]:
        """Norm -> the linear maps that read its output, and nothing else does: not so with adaptive softmax."""
        reader = self.project_out_dim or self.output_projection
        if self.layer_norm is None or reader is None or self.adaptive_softmax is not None:
            return {}
        return {"layer_norm": [reader]}

    def extract_features(self, prev_output_tokens, encoder_out=None, incremental_state=None, *args, **kwargs):
        """See fairseq; ``prev_output_tokens`` is ``B x T``, of which incremental decoding uses the last column."""
        tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        self.mask_slot.padding_mask = tokens.eq(self.padding_idx)
        try:
            return super().extract_features(prev_output_tokens, encoder_out, incremental_state, *args, **kwargs)
        finally:
            self.mask_slot.padding_mask = None


@register_model("transformer_pn", dataclass=TransformerPNConfig)
class TransformerPNModel(PowerNormModel, TransformerModelBase):
    """Transformer (Vaswani et al., 2017) with PN, PN-V, BN, LN or RMSNorm at each norm position.

    Everything fairseq's ``transformer`` does works unchanged: pre- and post-norm, shared embeddings, LayerDrop,
    activation checkpointing, incremental decoding.
    """

    options = TransformerPNConfig

    def norm_readers(self) -> Dict[str, List[nn.Module]]:
        """The encoder's final norm -> keys and values of the decoder's attention to it, if nothing else reads it."""
        encoder: Any = self.encoder
        decoder: Any = self.decoder
        attentions = [layer.encoder_attn for layer in decoder.layers if getattr(layer, "encoder_attn", None)]
        if encoder.layer_norm is None or decoder.cross_self_attention:
            return {}
        return {"encoder.layer_norm": [reader for each in attentions for reader in projections(each, "kv")]}

    @classmethod
    def complete(cls, args):
        """Fill in fairseq's defaults."""
        transformer_legacy.base_architecture(args)

    @classmethod
    def check_options(cls, args):
        """See :class:`PowerNormModel`; an output that shares its weights with embeddings is of their size."""
        super().check_options(args)
        names = ("share_decoder_input_output_embed", "share_all_embeddings")
        shared = [name for name in names if getattr(args, name, False)]
        tied = shared and not getattr(args, "adaptive_softmax_cutoff", None)
        if tied and args.decoder_output_dim != args.decoder_embed_dim:
            raise ValueError(
                f"--decoder-output-dim {args.decoder_output_dim} and --decoder-embed-dim {args.decoder_embed_dim}: must be "
                f"equal where input and output share their embeddings ({flag(shared[0])})"
            )

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model from flat options (Namespace or DictConfig).

        Raises:
            ValueError: an option is unknown or has an invalid value, or the task is of another kind
        """
        args, norms, kept = cls.read_options(cfg, task)
        if getattr(args, "post_norm", False):
            args.encoder_normalize_before = args.decoder_normalize_before = False
        config = TransformerConfig.from_namespace(args)
        config.norms = norms
        model = super().build_model(config, task)
        model.kept_layers = kept
        return model

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return PowerNormEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return PowerNormDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def _pre_norm(args: Namespace) -> None:
    """Norms before each block, unless ``post_norm`` is asked for: a checkpoint's options do not say both."""
    before = not getattr(args, "post_norm", False)
    fill(args, encoder_normalize_before=before, decoder_normalize_before=before)


@register_architecture("transformer_pn", "transformer_pn_tiny")
def tiny(args):
    """Transformer-Tiny of Wu et al. (ACL 2021) for Multi30k: 4+4 layers, d=128, FFN 256, 4 heads."""
    _pre_norm(args)
    for side in ("encoder", "decoder"):
        fill(
            args,
            **{
                f"{side}_layers": 4,
                f"{side}_embed_dim": 128,
                f"{side}_ffn_embed_dim": 256,
                f"{side}_attention_heads": 4,
            },
        )
    fill(args, dropout=0.3)
    transformer_legacy.base_architecture(args)


@register_architecture("transformer_pn", "transformer_iwslt_de_en_v2")
def authors_iwslt_de_en(args):
    """The same under the name that the authors' code saves with its checkpoints; its norms are those of that code."""
    for option in AUTHORS_NORM_OPTIONS:
        if hasattr(args, option):
            setattr(args, option, AUTHORS_NORMS.get(getattr(args, option), getattr(args, option)))
    iwslt_de_en(args)


@register_architecture("transformer_pn", "transformer_pn_iwslt_de_en")
def iwslt_de_en(args):
    """The authors' IWSLT14 De-En model: 6+6 layers, d=512, FFN 1024, 4 heads."""
    _pre_norm(args)
    fill(args, dropout=0.3, attention_dropout=0.1, activation_dropout=0.1)
    transformer_legacy.transformer_iwslt_de_en(args)


@register_architecture("transformer_pn", "transformer_pn_wmt_en_de")
def wmt_en_de(args):
    """Transformer-base for WMT14 En-De: 6+6 layers, d=512, FFN 2048, 8 heads."""
    _pre_norm(args)
    transformer_legacy.transformer_wmt_en_de(args)


@register_architecture("transformer_pn", "transformer_pn_wmt_en_de_big")
def wmt_en_de_big(args):
    """The authors' WMT14 En-De model, Transformer-big as in tensor2tensor: 6+6 layers, d=1024, FFN 4096, 16 heads."""
    _pre_norm(args)
    transformer_legacy.transformer_wmt_en_de_big_t2t(args)
