"""GRPO beside TRL's GRPOTrainer: the same batch, the same loss and gradient, by TRL's own code."""

from dataclasses import replace

import pytest
import torch
from support.training import answered, assert_close, batch_of, gradient, loaded

from lora_ppo import training


@pytest.fixture
def trl_loss(llama, tmp_path):
    """`trl_loss(policy, config, batch, advantages, ...)`: GRPOTrainer's loss of a batch, whole, on the policy's model.

    The trainer is TRL's own, made as its users make it, with PEFT's own layers; it is given the policy's adapters.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def make(config, loss_type):
        arguments = GRPOConfig(
            output_dir=str(tmp_path),
            loss_type=loss_type,
            beta=config.kl_coef,
            use_bias_correction_kl=False,  # Shao et al. 2024, equation 4, as it stands there
            epsilon=config.cliprange,
            temperature=config.temperature,
            scale_rewards="none",
            per_device_train_batch_size=config.batch_size,
            num_generations=config.group_size,
            max_completion_length=config.max_new_tokens,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        )
        return GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(llama, padding_side="left"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "1"}] * 8),
            peft_config=LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                target_modules=list(config.target_modules),
                task_type="CAUSAL_LM",
            ),
        )

    def loss(loss_type, policy, config, batch, advantages, old_logprobs, ref_logprobs):
        trainer, t = make(config, loss_type), batch.response_mask.shape[1]
        trainer.current_gradient_accumulation_steps = 1
        given = {
            "prompt_ids": batch.input_ids[:, :-t],
            "prompt_mask": batch.attention_mask[:, :-t].long(),
            "completion_ids": batch.input_ids[:, -t:],
            "completion_mask": batch.response_mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old_logprobs,
            "ref_per_token_logps": ref_logprobs,
            "num_items_in_batch": batch.response_mask.sum(),
        }
        theirs = dict(trainer.model.eval().named_parameters())
        ours = {name: p for name, p in policy.parameters.items() if not name.startswith("value_head")}
        assert {name for name, p in theirs.items() if p.requires_grad} == ours.keys()
        for name, p in ours.items():
            theirs[name].data.copy_(p.data)
        result = trainer._compute_loss(trainer.model, given)
        result.backward()
        return result.item(), {name: theirs[name].grad for name in ours}

    return loss


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])  # means over the tokens of a pass, and of a step
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("drifted", [False, True])
def test_loss_and_gradient_are_trls(llama, accelerator, trl_loss, loss_type, kl_coef, normalize, drifted):
    """On fresh samples, and on those of a policy that has moved so far since that ratios are clipped on both sides."""
    settings = {"algorithm": "grpo", "group_size": 4, "batch_size": 8, "mini_batch_size": 8, "temperature": 0.7}
    settings |= {"kl_coef": kl_coef, "normalize_groups": normalize, "cliprange": 0.2}
    policy, config = loaded(llama, **settings)
    trajectories = answered(policy, [1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0])
    experience, _ = training.examine(policy, accelerator, config, trajectories)
    if drifted:
        noise = torch.randn(experience.logprobs.shape, generator=torch.Generator().manual_seed(1))
        experience = replace(experience, logprobs=experience.logprobs + 0.4 * noise)
    tokens = experience.batch.response_mask.sum().item()
    policy.optimizer.zero_grad()
    parts = training.gradients(policy, accelerator, config, experience, tokens)
    adapters = {name: p for name, p in policy.parameters.items() if not name.startswith("value_head")}
    ours = {name: p.grad.clone() for name, p in adapters.items()}
    assert (parts["clip_fraction"] > 0.1) == drifted

    # The same quantities for TRL, where they are inputs: advantages by hand, log-probabilities as sampled.
    scores = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0]).view(2, 4)
    advantages = scores - scores.mean(1, keepdim=True)
    if normalize:
        advantages = advantages / (scores.std(1, keepdim=True) + 1e-4)
    policy.optimizer.zero_grad()
    wanted, theirs = trl_loss(
        loss_type,
        policy,
        config,
        batch_of(policy, trajectories),
        advantages.flatten(),
        experience.logprobs,
        experience.ref_logprobs,
    )
    assert parts["loss"] == pytest.approx(wanted, abs=1e-5)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(g.abs().max() for g in ours.values()) > 1e-2


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_one_two_and_four_minibatches_give_the_same_gradient(llama, accelerator, algorithm):
    """However many passes an optimizer step is made of, where answers have unequal lengths and a group is flat."""
    settings = {"algorithm": algorithm, "group_size": 2, "batch_size": 8, "mini_batch_size": 8, "kl_coef": 0.2}
    policy, config = loaded(llama, **settings)
    trajectories = answered(policy, [1.0, 0.0, 0.5, 0.5, 0.0, 1.0, 0.25, 1.0])
    lengths = [1, 6, 3, 2, 5, 4, 6, 2]
    for trajectory, length in zip(trajectories, lengths, strict=True):
        trajectory.response, trajectory.chosen = trajectory.response[:length], trajectory.chosen[:length]
    whole = gradient(policy, config, accelerator, trajectories)
    for count in (2, 4):
        split = {"mini_batch_size": 8 // count, "gradient_accumulation_steps": count}
        assert_close(gradient(policy, config, accelerator, trajectories, **split), whole)
    assert any(g.abs().max() > 1e-3 for g in whole.values())
