"""``tensorized_lm_pn``: the language model of Ma et al. (NeurIPS 2019), with a choice of norms."""
import logging
from dataclasses import field, make_dataclass
from typing import Optional

from fairseq.models import register_model, transformer_lm
from fairseq.models.transformer_lm import TransformerLanguageModelConfig

from ..layers import DecoderLayer, wrap_layer
from ..options import LMNormOptions, flag
from .base import fill, flat_fields, register_architecture
from .tensorized_attention import TensorizedAttention
from .transformer_lm_pn import ARCHITECTURES, TransformerLMPNModel, complete_by
from .transformer_pn import PowerNormDecoder

logger = logging.getLogger(__name__)

#: what fairseq's decoders answer where there is no limit
NO_LIMIT = 1000000

#: options of fairseq's language model that concern softmax attention or absolute positions: not offered, and fixed at
NOT_APPLICABLE = dict(
    decoder_attention_heads=1,
    attention_dropout=0.0,
    no_token_positional_embeddings=True,
    decoder_learned_pos=False,
    scale_heads=False,
    decoder_xformers_att_config=None,
)

TensorizedLMPNConfig = make_dataclass(
    "TensorizedLMPNConfig",
    flat_fields(TransformerLanguageModelConfig, *ARCHITECTURES, without=NOT_APPLICABLE)
    + [
        (name, kind, field(default=default, metadata={"help": text}))
        for name, kind, default, text in (
            ("tensorized_window", Optional[int], None, "length L of the window, the longest block of tokens"),
            ("tensorized_rank", Optional[int], None, "size R of the attention head"),
            ("tensorized_cores", Optional[int], None, "number of core tensors that are averaged"),
            (
                "tensorized_noncausal", bool, False,
                "published behaviour: each position sees the whole window, its own target included; no language model",
            ),
        )
    ],
    bases=(LMNormOptions,),
)  # fmt: skip
TensorizedLMPNConfig.__module__ = __name__


class SelfAttention(TensorizedAttention):
    """Tensorized attention as fairseq's decoder layer calls its self-attention; it sees to causality itself."""

    num_heads = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head_dim = self.rank

    def forward(self, query, key, value, key_padding_mask=None, **kwargs):
        """``query`` is ``T x B x C``, ``key_padding_mask`` ``B x T`` or None; returns the output and no weights."""
        return super().forward(query, key_padding_mask), None

    def _get_input_buffer(self, incremental_state):
        return {}  # no state is kept between steps


class TensorizedDecoderLayer(DecoderLayer):
    """Decoder layer with tensorized self-attention."""

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        return SelfAttention(
            embed_dim,
            window=cfg.tensorized_window,
            rank=cfg.tensorized_rank,
            cores=cfg.tensorized_cores,
            causal=not cfg.tensorized_noncausal,
        )

    def norm_readers(self):
        """As in any decoder layer; but the attention, which sets its input at padding to zero, reads more than maps."""
        return {name: readers for name, readers in super().norm_readers().items() if name != "self_attn_layer_norm"}


class TensorizedDecoder(PowerNormDecoder):
    """Decoder of tensorized layers, which share the biases u and w (under each layer's name in a checkpoint).

    A step of incremental decoding evaluates the window of the last L tokens anew.
    """

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.window = cfg.tensorized_window
        attentions = [module for module in self.modules() if isinstance(module, TensorizedAttention)]
        for attention in attentions[1:]:
            attention.share_biases(attentions[0])

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return wrap_layer(TensorizedDecoderLayer(cfg, no_encoder_attn), cfg)

    def extract_features(self, prev_output_tokens, encoder_out=None, incremental_state=None, *args, **kwargs):
        """See fairseq; ``prev_output_tokens`` is ``B x T``, with T at most L unless decoding is incremental.

        Raises:
            ValueError: a block of tokens is longer than the window
        """
        if incremental_state is not None:
            window = prev_output_tokens[:, -self.window :]
            x, extra = super().extract_features(window, encoder_out, None, *args, **kwargs)
            return x[:, -1:], extra
        length = prev_output_tokens.size(1)
        if length > self.window:
            raise ValueError(
                f"a block of {length} tokens is longer than the model's window, --tensorized-window {self.window}: "
                f"give --tokens-per-sample {self.window} or less (one less with --add-bos-token)"
            )
        return super().extract_features(prev_output_tokens, encoder_out, None, *args, **kwargs)

    def max_positions(self):
        """No limit: generated text may be longer than a window; longer blocks of data are an error, not left out."""
        return NO_LIMIT


@register_model("tensorized_lm_pn", dataclass=TensorizedLMPNConfig)
class TensorizedLMPNModel(TransformerLMPNModel):
    """Tensorized Transformer language model, post-norm with two norms a layer, with a choice of norms.

    Each block of at most L tokens (``--tensorized-window``, the largest useful ``--tokens-per-sample``) is evaluated by
    itself, without memory. Position i of a block attends to j <= i and k <= i. With ``--tensorized-noncausal``, the
    published behaviour, it attends to the whole block, in which its own target stands: what is then called perplexity
    is not that of a language model. The option ``tensorized_noncausal`` of a checkpoint's configuration tells such
    models.
    """

    options = TensorizedLMPNConfig

    @classmethod
    def complete(cls, args):
        """Fill in the sizes of the authors' scripts for Penn Treebank and, for the rest, fairseq's defaults."""
        fill(
            args,
            decoder_normalize_before=False,
            decoder_layers=3,
            decoder_embed_dim=256,
            decoder_ffn_embed_dim=2100,
            share_decoder_input_output_embed=True,
            tensorized_window=32,
            tensorized_rank=40,
            tensorized_cores=1,
            tensorized_noncausal=False,
        )
        for name, value in NOT_APPLICABLE.items():
            setattr(args, name, value)
        for name in ("tensorized_window", "tensorized_rank", "tensorized_cores"):
            if getattr(args, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(args, name)}: must be positive")
        complete_by(transformer_lm.base_lm_architecture, args)

    @classmethod
    def build_decoder(cls, cfg, dictionary, embed_tokens):
        if cfg.tensorized_noncausal:
            logger.warning(
                "--tensorized-noncausal: each position sees the token that it is asked for. The perplexity of this "
                "model is NOT the perplexity of a language model."
            )
        return TensorizedDecoder(cfg, dictionary, embed_tokens, no_encoder_attn=True)


@register_architecture("tensorized_lm_pn", "tensorized_lm_pn_ptb")
def ptb(args):
    """The authors' Penn Treebank model: 3 layers, d=256, FFN 2100, R=40, windows of 32 tokens."""
    fill(args, dropout=0.3, activation_dropout=0.3)
    TensorizedLMPNModel.complete(args)


@register_architecture("tensorized_lm_pn", "tensorized_lm_pn_wiki103")
def wiki103(args):
    """The authors' WikiText-103 model: 6 layers, windows of 80, adaptive softmax tied to embeddings of full size."""
    fill(
        args,
        decoder_layers=6,
        tensorized_window=80,
        dropout=0.1,
        activation_dropout=0.1,
        adaptive_input=True,
        adaptive_input_cutoff="20000,40000,200000",
        adaptive_input_factor=1.0,
        adaptive_softmax_cutoff="20000,40000,200000",
        adaptive_softmax_factor=1.0,
        tie_adaptive_weights=True,
        tie_adaptive_proj=True,
        share_decoder_input_output_embed=False,
    )
    TensorizedLMPNModel.complete(args)
