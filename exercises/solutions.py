"""The solutions: the library's own functions. Look after you have tried; lora_ppo/ppo.py has them."""

from lora_ppo.ppo import (  # noqa: F401
    chosen_logprobs,
    compute_rewards,
    entropy,
    gae,
    minibatch_update,
    policy_loss,
    ppo_losses,
    value_loss,
)
