"""Small random models with PN, and their data, for all trainers: sentences of unequal lengths, padded."""
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.masks import attach_mask
from fairseq_powernorm.norms import RunningNorm

SYMBOLS, LENGTH = 24, 7
STEPS, SENTENCES = 6, 8
#: PN in which micro-batches are exactly one batch
ALGORITHM2 = "power:variant=algorithm2"


def with_norms(model, norm):
    """PN or another norm in place of LayerNorm, which sees the attention mask of each call; None: the model as it is."""
    if norm is not None:
        replace_norms(model, norm, groups=2)
        attach_mask(model)
    return model


def build(kind, norm=ALGORITHM2, *, tied=True):
    """``bert`` or ``gpt``, in float64, with random weights that are the same in each call; tied embeddings or not."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=SYMBOLS, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied)
    if kind == "bert":
        model = BertForMaskedLM(
            BertConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, max_position_embeddings=16, **sizes,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes,
            )
        )
    return with_norms(model, norm).double().train()


def sentences(number=STEPS * SENTENCES, padding=LENGTH, seed=0):
    """A list of examples: ``input_ids``, ``attention_mask``, ``labels``, each of length ``padding``."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(number):
        length = int(torch.randint(3, LENGTH + 1, (), generator=generator))
        ids = torch.zeros(padding, dtype=torch.long)
        ids[:length] = torch.randint(3, SYMBOLS, (length,), generator=generator)
        mask = (torch.arange(padding) < length).long()
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return examples


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    """``compute_loss_func`` of transformers' Trainer: a share of the mean over all tokens of a step."""
    logits = outputs["logits"]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def state(model):
    """Parameters and buffers of a model, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one, other, **tolerance):
    """Two states agree: to the bit, unless a tolerance is given."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], **(tolerance or dict(rtol=0, atol=0)), msg=lambda m, name=name: f"{name}: {m}"
        )


def steps(model):
    """Step counts of all norms of a model, as a set."""
    return {int(module.iters) for module in model.modules() if isinstance(module, RunningNorm)}
