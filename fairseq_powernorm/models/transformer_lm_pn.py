"""``transformer_lm_pn``: fairseq's Transformer language model with a choice of norms."""
from argparse import Namespace
from dataclasses import field, make_dataclass

from fairseq.models import register_model, transformer_lm
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from ..options import LMNormOptions
from .base import PowerNormModel, fill, flat_fields, register_architecture
from .transformer_pn import PowerNormDecoder

#: fairseq's architectures that set, between them, every option of fairseq that those of this package set
ARCHITECTURES = (transformer_lm.base_lm_architecture, transformer_lm.transformer_lm_baevski_wiki103)

TransformerLMPNConfig = make_dataclass(
    "TransformerLMPNConfig",
    flat_fields(TransformerLanguageModelConfig, *ARCHITECTURES)
    + [
        ("post_norm", bool, field(default=False, metadata={"help": "norm after each residual block"})),
    ],
    bases=(LMNormOptions,),
)
TransformerLMPNConfig.__module__ = __name__


def complete_by(architecture, args: Namespace) -> None:
    """Fill in a language model architecture of fairseq; unlike there, ``decoder_normalize_before`` can be False."""
    pre_norm = getattr(args, "decoder_normalize_before", True) and not getattr(args, "post_norm", False)
    architecture(args)
    args.decoder_normalize_before = pre_norm
    args.base_shuffle = int(args.base_shuffle)  # declared a number; fairseq sets False, which hydra refuses


@register_model("transformer_lm_pn", dataclass=TransformerLMPNConfig)
class TransformerLMPNModel(PowerNormModel, TransformerLanguageModel):
    """Transformer language model with PN, PN-V, BN, LN or RMSNorm at each norm position.

    ``decoder_norm_*`` choose the norms, PN by default; the ``encoder_norm_*`` options are refused. In training, the
    batch statistics of BN, of PN-V and of PN's warm-up are taken over all positions of a batch, so that a position's
    output depends on later tokens through them; in evaluation, and with PN after its warm-up, it does not. What
    fairseq's ``transformer_lm`` does works unchanged: adaptive inputs and softmax, incremental decoding, activation
    checkpointing. As there, texts are at most ``--tokens-per-sample`` (or ``--max-target-positions``) tokens long.
    """

    options = TransformerLMPNConfig

    @classmethod
    def complete(cls, args):
        """Fill in fairseq's defaults, pre-norm among them."""
        complete_by(transformer_lm.base_lm_architecture, args)

    @classmethod
    def check_options(cls, args):
        """See :class:`PowerNormModel`; tied embeddings, the default of some architectures, are of one size."""
        super().check_options(args)
        tied = args.share_decoder_input_output_embed and not getattr(args, "adaptive_softmax_cutoff", None)
        if tied and args.decoder_input_dim != args.decoder_output_dim:
            raise ValueError(
                f"--decoder-input-dim {args.decoder_input_dim} and --decoder-output-dim {args.decoder_output_dim}: must be "
                "equal where input and output share their embeddings (--share-decoder-input-output-embed)"
            )

    @classmethod
    def build_model(cls, cfg, task):
        """Build the model from flat options (Namespace or DictConfig).

        Raises:
            ValueError: an option is unknown or has an invalid value, or the task is of another kind
        """
        args, norms, kept = cls.read_options(cfg, task)
        # fairseq builds a model without layers, of which the embedding is used
        without_layers = Namespace(**vars(args))
        without_layers.decoder_layers = without_layers.base_layers = 0
        embed_tokens = super().build_model(without_layers, task).decoder.embed_tokens
        args.max_target_positions = without_layers.max_target_positions
        config = TransformerConfig.from_namespace(args)
        config.norms = norms
        model = cls(cls.build_decoder(config, task.target_dictionary, embed_tokens))
        model.kept_layers = kept
        return model

    @classmethod
    def build_decoder(cls, cfg, dictionary, embed_tokens):
        return PowerNormDecoder(cfg, dictionary, embed_tokens, no_encoder_attn=True)


@register_architecture("transformer_lm_pn", "transformer_lm_pn_ptb")
def ptb(args):
    """For the 0.9M words of Penn Treebank: 4 layers, d=256, FFN 1024, 4 heads, tied embeddings, strong dropout."""
    fill(
        args,
        decoder_layers=4,
        decoder_embed_dim=256,
        decoder_ffn_embed_dim=1024,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        dropout=0.4,
        attention_dropout=0.2,
        activation_dropout=0.2,
    )
    complete_by(transformer_lm.base_lm_architecture, args)


@register_architecture("transformer_lm_pn", "transformer_lm_pn_wiki103")
def wiki103(args):
    """The model of Baevski & Auli (ICLR 2019): 16 layers, d=1024, FFN 4096, 8 heads, adaptive inputs and softmax."""
    complete_by(transformer_lm.transformer_lm_baevski_wiki103, args)
