"""A small policy, its answers, and a naive PPO step to compare with."""

import copy
import math
from types import SimpleNamespace

import torch

from config import Config
from lora_ppo.forward import collate
from lora_ppo.policy import Policy
from support.tiny import PROMPTS as ROLE_PROMPTS

NAN = math.nan
PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [20]]
RESPONSES = [[30, 31, 32, EOS], [40, EOS], [50, 51, 52, 53, 54, EOS]]
CHOSEN = [[True] * 4, [True] * 2, [True, True, False, False, True, True]]


def make_policy(**overrides):
    """A random two-layer Llama with adapters that already differ from the base, and `untouched`, a copy of the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
            pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS, tie_word_embeddings=False, **shape,
        )
    ).eval()  # fmt: skip
    untouched = copy.deepcopy(base)
    options = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "temperature": 0.7, "target_kl": 100.0}
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    policy = Policy(base, tokenizer, Config(**(options | overrides)), ROLE_PROMPTS)
    policy.untouched = untouched
    policy.beginnings = SimpleNamespace(kept={}, shared=lambda prompts: ())  # no tokenizer, no roles
    g = torch.Generator().manual_seed(11)
    for name, p in policy.parameters.items():
        if "lora_B" in name or "value_head" in name:
            p.data.copy_(0.2 * torch.randn(p.shape, generator=g))
    return policy


def make_batch(n=3):
    """`n` answers of unequal lengths, one in three of them with environment text in the middle."""
    rows = [i % 3 for i in range(n)]
    prompts = [[(token + 3 * i) % 64 for token in PROMPTS[row]] for i, row in enumerate(rows)]
    return collate(prompts, [RESPONSES[row] for row in rows], PAD, torch.device("cpu"), [CHOSEN[row] for row in rows])


def naive_forward(policy, model, ids, p):
    """One row without padding, all logits: (T, V) log-probabilities and (T,) values before each response token."""
    hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    scaled = (hidden @ model.lm_head.weight.T) / policy.config.temperature
    logp = scaled - scaled.exp().sum(-1, keepdim=True).log()
    values = hidden.detach() @ policy.value_head.weight[0] + policy.value_head.bias  # the head alone learns from them
    return logp[p - 1 : -1], values[p - 1 : -1]


def naive_rows(policy, batch):
    """The batch taken apart: for each row the (T, V) log-probabilities, reference's too, values, tokens and mask."""
    t = batch.response_mask.shape[1]
    for ids, real, mask in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        p, length = int(real[:-t].sum()), int(real[-t:].sum())
        row = ids[real].tolist()
        logp, values = naive_forward(policy, policy.model.base_model.model, row, p)
        with torch.no_grad():
            ref, _ = naive_forward(policy, policy.untouched, row, p)
        yield SimpleNamespace(logp=logp, ref=ref, values=values, tokens=row[p:], mask=mask[:length].tolist())
