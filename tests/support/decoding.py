"""Policies with prompts to decode, for the tests of decoding and of recorded passes."""

import pytest

from lora_ppo.chat import encode_chat
from lora_ppo.loading import load_policy
from support.tiny import ARCHITECTURES, randomize_adapter, tiny_config

QUESTIONS = ("What is the capital of France?", "Hi", "Which planet is the largest of them all, and why is that?")


@pytest.fixture(params=ARCHITECTURES)
def policy(request, tiny_folder):
    """A policy whose adapters change what is written; replies outgrow the sliding windows of 16 tokens."""
    policy, _ = load_policy(tiny_config(tiny_folder(request.param), max_new_tokens=24))
    randomize_adapter(policy)
    return policy


def prompts(policy) -> list[list[int]]:
    return [encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(question)) for question in QUESTIONS]
