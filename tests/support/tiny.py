"""Tiny random models of several architectures, in the form in which hubs and folders hold real ones.

The weights are random and the tokenizer is small, but both are loaded by the program's own loading code.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from config import Config
from lora_ppo.gate import Gate, write_gate
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.prompts import load_prompts
from lora_ppo.quiz import quiz_json
from lora_ppo.settings import BUNDLED_MODEL, GATE_FILE, PROMPTS_FILE

MIXTURES = ("qwen2_moe", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "hunyuan", "glm4_moe", "mixtral")
MIXTURE = {"moe_intermediate_size": 16}
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma3", "phi3", "smollm3")
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
PROMPTS = load_prompts(BUNDLED_MODEL / PROMPTS_FILE)  # short ones, without examples
CORPUS = (
    PROMPTS.tutor.system,
    PROMPTS.quizmaster.system,
    PROMPTS.solver.system,
    "system\nuser\nassistant\n",
    "What is the capital of France? Paris is the capital of France. Which city is the capital of Italy? Rome.",
    quiz_json("What is the capital of France?", "Paris", ["Rome", "Madrid", "Berlin"]),
    quiz_json("What is 2 + 2?", "4", ["3", "5", "22"]),
    quiz_json("Which planet is the largest?", "Jupiter", ["Mars", "Saturn", "Earth"]),
    "A) Paris\nB) Rome\nC) Madrid\nD) Berlin",
    "0 1 2 3 4 5 6 7 8 9 A B C D a b c d",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RAISES_ON_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
TEMPLATES = {"mistral": RAISES_ON_SYSTEM, "gemma3": DROPS_SYSTEM, "phi3": None}


def tiny_tokenizer(chat_template: str | None = CHATML) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 600 tokens: any text can be written in it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(architecture: str, tokenizer, seed: int = 0, **sizes: int) -> transformers.PreTrainedModel:
    """Two layers of random float32 weights, large enough that the logits are far from uniform."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "tie_word_embeddings": architecture in ("gemma3", "qwen3"),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | sizes
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**shape),
        "qwen3": lambda: transformers.Qwen3Config(**shape, head_dim=8),
        "llama": lambda: transformers.LlamaConfig(**shape),
        "mistral": lambda: transformers.MistralConfig(**shape, sliding_window=16),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **shape,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "phi3": lambda: transformers.Phi3Config(**shape),
        "smollm3": lambda: transformers.SmolLM3Config(**shape, no_rope_layers=[1, 0]),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=None
        ),
        "phi": lambda: transformers.PhiConfig(**shape),
        "opt": lambda: transformers.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=16),
        "falcon_alibi": lambda: transformers.FalconConfig(**shape, alibi=True),
        "bert": lambda: transformers.BertConfig(**shape),
        "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(**shape, lru_width=32),
        "mamba": lambda: transformers.MambaConfig(**shape),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **shape, **MIXTURE, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=24
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **shape, **MIXTURE, num_experts=4, num_experts_per_tok=2, head_dim=8, mlp_only_layers=[0]
        ),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **shape | {"num_key_value_heads": 4},
            **MIXTURE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        ),
        "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
            **shape, **MIXTURE, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1
        ),
        "hunyuan": lambda: transformers.HunYuanMoEV1Config(
            **shape, head_dim=8, num_experts=4, moe_topk=2, num_shared_expert=1
        ),
        "glm4_moe": lambda: transformers.Glm4MoeConfig(
            **shape,
            **MIXTURE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        "mixtral": lambda: transformers.MixtralConfig(**shape, num_local_experts=4),
    }[architecture]()
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_tiny(architecture: str, folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Writes model, tokenizer and prompts to `folder`, which `load_policy` then takes as `model_name`."""
    tokenizer = tiny_tokenizer(TEMPLATES.get(architecture, CHATML))
    tiny_model(architecture, tokenizer, seed, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / PROMPTS_FILE).write_text(PROMPTS.as_yaml(), encoding="utf-8")
    write_gate(folder / GATE_FILE, Gate("options", right=1, shown=1, asked=1))
    return folder


def tiny_config(folder: Path, **settings) -> Config:
    """Settings under which a step on a tiny model is large, and is never undone."""
    defaults = {
        "device": "cpu",
        "dtype": "float32",
        "lora_r": 4,
        "lora_alpha": 8,
        "max_new_tokens": 12,
        "learning_rate": 1e-3,
        "kl_coef": 0.0,
        "target_kl": 1e6,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    return Config(model_name=str(folder), **(defaults | settings))


def tiny_policy(folder: Path, **settings) -> Policy:
    """A policy as the program loads it."""
    return load_policy(tiny_config(folder, **settings))[0]


def randomize_adapter(policy: Policy, seed: int = 1) -> None:
    """Gives the adapters an effect, as training would: a fresh adapter has none."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)


def drive(grammar: Callable, prefix: list[int], choose: Callable[[list[int], list[int]], int], limit: int) -> list[int]:
    """Writes under `grammar` after a prompt of one token: `choose(written, allowed)` picks each, up to `limit`."""
    written = list(prefix)
    vocabulary = grammar.policy.head.weight.shape[0]
    while len(written) < limit:
        scores = grammar(torch.tensor([[0, *written]]), torch.zeros(1, vocabulary))
        allowed = scores[0].isfinite().nonzero().flatten().tolist()
        written.append(choose(written, allowed))
        if written[-1] in grammar.policy.stop_ids:
            break
    return written
