"""fairseq's Transformer layers with the norms swapped by attribute and the padding mask handed to them.

fairseq calls a norm as ``norm(x)``. Each layer therefore owns a :class:`~fairseq_powernorm.norms.MaskSlot` that its
norms read; the layer's own ``forward`` fills the slot, so that the mask is there again when the layer is
recomputed under activation checkpointing.
"""
from typing import TYPE_CHECKING, Dict, List, Optional

from fairseq.distributed import fsdp_wrap
from fairseq.modules import transformer_layer
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from .norms import MaskSlot, build_norm

if TYPE_CHECKING:
    from .options import ChosenNorms


def swap_norm(
    module: nn.Module, attribute: str, norms: "ChosenNorms", side: str, position: str, dim: int, heads: int
) -> None:
    """Replace the norm ``module.attribute`` (if there is one) by the chosen one, reading ``module.mask_slot``."""
    if getattr(module, attribute) is None:
        return
    name, settings = norms.settings(side, position, dim, heads)
    norm = build_norm(name, dim, **settings)
    norm.mask_slot = module.mask_slot
    setattr(module, attribute, norm)


def wrap_layer(layer: nn.Module, cfg) -> nn.Module:
    """Activation checkpointing and sharding around a layer, as fairseq's ``build_*_layer`` do."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


#: fairseq 0.12.2 keeps second copies of an encoder layer's weights for its fused path: no gradient ever reaches them
FUSED_COPIES = tuple(f"{name}_{kind}" for name in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias"))


def projections(attention: nn.Module, names: str = "qkv") -> List[nn.Module]:
    """The linear maps of an attention for queries, keys and values."""
    return [getattr(attention, f"{name}_proj") for name in names]


class EncoderLayer(transformer_layer.TransformerEncoderLayerBase):
    """Encoder layer whose ``self_attn_layer_norm`` and ``final_layer_norm`` are those of ``cfg.norms``."""

    #: fairseq's class, which does the same where no norm needs the mask: after folding
    stock = transformer_layer.TransformerEncoderLayerBase

    def __init__(self, cfg, return_fc=False):
        super().__init__(cfg, return_fc)
        self.mask_slot = MaskSlot()
        heads = cfg.encoder.attention_heads
        swap_norm(self, "self_attn_layer_norm", cfg.norms, "encoder", "self", self.embed_dim, heads)
        swap_norm(self, "final_layer_norm", cfg.norms, "encoder", "ff", self.embed_dim, heads)
        # fairseq 0.12.2 in evaluation: a fused path that computes LayerNorm whatever norm stands there
        self.can_use_fastpath = False
        for name in FUSED_COPIES:
            self._parameters.pop(name, None)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Load as any module does, leaving out the copies that a checkpoint of fairseq 0.12.2 may hold."""
        for name in FUSED_COPIES:
            state_dict.pop(prefix + name, None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def norm_readers(self) -> Dict[str, List[nn.Module]]:
        """Norm -> the linear maps that read its output, and nothing else does: those of a pre-norm layer."""
        if not self.normalize_before:
            return {}
        return {"self_attn_layer_norm": projections(self.self_attn), "final_layer_norm": [self.fc1]}

    def forward(self, x: Tensor, encoder_padding_mask: Optional[Tensor], *args, **kwargs):
        """See fairseq; ``x`` is ``T x B x C``, ``encoder_padding_mask`` ``B x T`` or None."""
        self.mask_slot.padding_mask = encoder_padding_mask
        try:
            return super().forward(x, encoder_padding_mask, *args, **kwargs)
        finally:
            self.mask_slot.padding_mask = None


class DecoderLayer(transformer_layer.TransformerDecoderLayerBase):
    """Decoder layer with the norms of ``cfg.norms``; all of them see the decoder's own padding mask."""

    #: fairseq's class, which does the same where no norm needs the mask: after folding
    stock = transformer_layer.TransformerDecoderLayerBase
    #: position of ``self_attn_padding_mask`` after ``x`` and ``encoder_out`` in fairseq's signature
    _MASK_POSITION = 5

    def __init__(self, cfg, no_encoder_attn=False, **kwargs):
        super().__init__(cfg, no_encoder_attn, **kwargs)
        self.mask_slot = MaskSlot()
        heads = cfg.decoder.attention_heads
        for attribute, position in (
            ("self_attn_layer_norm", "self"),
            ("encoder_attn_layer_norm", "self"),
            ("final_layer_norm", "ff"),
        ):
            swap_norm(self, attribute, cfg.norms, "decoder", position, self.embed_dim, heads)

    def norm_readers(self) -> Dict[str, List[nn.Module]]:
        """Norm -> the linear maps that read its output, and nothing else does: those of a pre-norm layer."""
        if not self.normalize_before:
            return {}
        readers = {"final_layer_norm": [self.fc1]}
        if not self.cross_self_attention:  # whose keys and values come from the encoder as well
            readers["self_attn_layer_norm"] = projections(self.self_attn)
        if self.encoder_attn is not None:
            readers["encoder_attn_layer_norm"] = projections(self.encoder_attn, "q")
        return readers

    def forward(self, x: Tensor, encoder_out: Optional[Tensor] = None, *args, **kwargs):
        """See fairseq; ``x`` is ``T x B x C``, ``self_attn_padding_mask`` ``B x T`` or None."""
        if encoder_out is not None:
            # the gradients of keys and values are added up in the layer first, as activation checkpointing does it:
            # the same sum to the last bit with and without
            encoder_out = encoder_out.view_as(encoder_out)
        if len(args) > self._MASK_POSITION:
            self.mask_slot.padding_mask = args[self._MASK_POSITION]
        else:
            self.mask_slot.padding_mask = kwargs.get("self_attn_padding_mask")
        try:
            return super().forward(x, encoder_out, *args, **kwargs)
        finally:
            self.mask_slot.padding_mask = None


from . import register  # noqa: E402,F401  (whichever module for fairseq is imported first, all are registered)
