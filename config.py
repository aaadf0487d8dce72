"""Every setting of the tutor, each with its default and one line of help, and how it is set.

Lowest to highest: the defaults below, a YAML file (`--config FILE`), the command line (`key=value` or `--key value`).
`auto` settings are resolved when the model is loaded; what was resolved stands in `effective_config.yaml`.
"""

from dataclasses import dataclass

from lora_ppo.settings import BUNDLED_LEARNING_RATE, GPU_MODEL, Settings, setting


@dataclass
class Config(Settings):
    model_name: str = setting(
        "auto",
        "hub name, local folder, GGUF file, or smollm2 (see `make smollm2`); auto: the bundled model, with CUDA "
        + GPU_MODEL,
        group="model",
    )
    load_in_4bit: str = setting("auto", "NF4 base weights: auto (on CUDA, from a billion parameters on), true, false")
    bf16_copy: str = setting(
        "auto",
        "16-bit copy of NF4 weights, which spares updates to unpack them: auto (if it takes at most half of the free "
        "memory), true, false",
    )
    device: str = setting("auto", "auto (cuda, then mps, then cpu), or a torch device such as cuda:1")
    dtype: str = setting(
        "auto",
        "precision of the base: auto (float32; for any but the bundled model bfloat16 on CUDA, and on a CPU that "
        "multiplies it), float32, bfloat16",
    )
    compile: str = setting(
        "auto", "compile the passes that write an answer, on a CPU: auto (in the background, for large models), off"
    )
    prompts: str = setting(
        "", "YAML file of prompts, for all roles or some; else those of the model's folder, or prompts/default.yaml"
    )
    lora_r: int = setting(16, "rank of the LoRA adapters")
    lora_alpha: float = setting(32.0, "LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = setting(0.0, "LoRA dropout, in the gradient pass alone")
    target_modules: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers that get adapters"
    )
    temperature: float = setting(
        0.3, "sampling temperature of answers; PPO's policy is the distribution at it", group="generation"
    )
    quiz_temperature: float = setting(0.2, "sampling temperature of whole quizzes, the bundled model's way")
    top_p: float = setting(0.9, "nucleus sampling: the smallest set of tokens with this probability")
    max_new_tokens: int = setting(256, "longest answer, and longest quiz, in tokens")
    quiz_tries: int = setting(3, "quizzes made, or wrong options asked for, before a turn goes without one")
    learning_rate: float | None = setting(
        None,
        "AdamW's; auto: by the model's size, 2e-4 for 0.1 B parameters, 6e-5 for 0.5 B, 1e-5 from 4 B on; "
        f"bundled model {BUNDLED_LEARNING_RATE:g}",
        group="PPO",
    )
    batch_size: int = setting(1, "answered quizzes that make one PPO step")
    ppo_epochs: int = setting(1, "passes over the batch in one step")
    cliprange: float = setting(0.2, "how far the probability ratio may move before its gradient is cut")
    cliprange_value: float = setting(0.2, "how far a value may move from the rollout's")
    vf_coef: float = setting(0.1, "weight of the value loss")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus")
    gamma: float = setting(1.0, "discount per token")
    lam: float = setting(
        1.0,
        "lambda of generalized advantage estimation; 1: the first token of an answer gets as much reward as the last",
    )
    kl_coef: float = setting(0.3, "price of a nat of divergence from the base model, per token")
    adaptive_kl: bool = setting(False, "steer kl_coef towards kl_target")
    kl_target: float = setting(6.0, "wanted divergence from the base model, nats per answer (adaptive_kl)")
    kl_horizon: int = setting(10000, "answers over which kl_coef adapts (adaptive_kl)")
    target_kl: float = setting(
        0.1, "trust region: a step that moves the policy further, in nats per token, is undone; 0: none"
    )
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    user: str = setting(
        "", "who learns: each name has adapters, journal and log of its own, over one base model", "session"
    )
    pretest: bool = setting(False, "quiz before the answer, too: what you knew before earns nothing")
    reward_right: float = setting(1.0, "reward of an answer after which the choice is right")
    reward_wrong: float = setting(-1.0, "reward of an answer after which the choice is wrong")
    checkpoint_dir: str = setting("checkpoints", "where checkpoints and the journal are kept")
    log_dir: str = setting("logs", "where run.log is written")
    save_every: int = setting(10, "steps between checkpoints")
    keep_checkpoints: int = setting(5, "checkpoints that are kept, at least 2")
    precompute: bool = setting(
        True,
        "compute both outcomes while the quiz is read: no wait after the choice, memory for two more trained states",
    )
    reveal: bool = setting(False, "show the right option after a wrong choice")
    resume: str = setting(
        "auto", "auto (the newest whole checkpoint), none (a new run beside the old), or a checkpoint folder"
    )
    learner: str = setting("person", "who takes the quizzes: person, or simulated (the base model reads the answers)")
    questions: str = setting("", "text file of questions, one per line (learner=simulated)")
    steps: int = setting(100, "steps after which the session ends (learner=simulated)")
    seed: int = setting(0, "seed of sampling, shuffling and adapter weights")
