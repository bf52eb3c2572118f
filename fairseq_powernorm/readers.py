"""Which linear maps read the output of a norm, in models whose code does not say so: those of torch, transformers and timm.

A model of this package says it by a method ``norm_readers``. Of other packages the layers are known in which nothing but the
modules named here reads the norm; elsewhere a folded norm keeps its scale and shift.
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from torch import nn

#: layer -> norm -> modules that read it; a layer of torch's or timm's must be pre-norm
_OF_LAYERS: Dict[str, Dict[str, Sequence[str]]] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": {"norm1": ["self_attn"], "norm2": ["linear1"]},
    "torch.nn.modules.transformer.TransformerDecoderLayer": {"norm1": ["self_attn"], "norm3": ["linear1"]},
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]},
    "timm.models.vision_transformer.Block": {"norm1": ["attn.qkv"], "norm2": ["mlp.fc1"]},
    **dict.fromkeys(
        (
            "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
            "transformers.models.mistral.modeling_mistral.MistralDecoderLayer",
            "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
            "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
        ),
        {
            "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        },
    ),
}


class LinearMap(NamedTuple):
    """A linear map of the last dimension.

    Attributes:
        module: whose parameters are meant
        weight, bias: their names
        transposed: the weight is ``in x out``, as Hugging Face's Conv1D has it, not ``out x in``
    """

    module: nn.Module
    weight: str
    bias: str
    transposed: bool = False


def linear_map(reader: nn.Module) -> Optional[LinearMap]:
    """What a module does first with its input, if that is a plain linear map; else None."""
    if type(reader) is nn.Linear:
        return LinearMap(reader, "weight", "bias")
    if type(reader) is nn.MultiheadAttention:  # of which queries, keys and values are the same input
        whole = reader.in_proj_weight is not None and reader.in_proj_bias is not None
        return LinearMap(reader, "in_proj_weight", "in_proj_bias") if whole else None
    kind = type(reader)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return LinearMap(reader, "weight", "bias", transposed=True)
    return None


def norm_readers(owner: nn.Module) -> Dict[str, List[nn.Module]]:
    """Norm of a layer -> the modules, all of them, that read its output; empty where that is not known."""
    own: Any = getattr(owner, "norm_readers", None)
    if own is not None:
        found: Dict[str, List[nn.Module]] = own()
        return found
    kind = type(owner)
    names = _OF_LAYERS.get(f"{kind.__module__}.{kind.__qualname__}", {})
    if getattr(owner, "norm_first", True) is not True or "forward" in vars(owner):
        return {}
    known = {}
    for norm, readers in names.items():
        try:
            known[norm] = [owner.get_submodule(reader) for reader in readers]
            owner.get_submodule(norm)
        except AttributeError:
            known.pop(norm, None)
    return known
