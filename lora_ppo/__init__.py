"""PPO for LoRA adapters on one machine: the library that the tutor, training and evaluation share.

A room is one module. Read step and ppo first: one PPO update, and its equations.

    settings, statistics        how settings are declared and checked; intervals and tests
    ppo                         the mathematics, pure functions of tensors
    chat                        roles and their prompts; chats as token ids
    layers                      layers that are quicker or keep less
    caches, compiled, recording one pass behind a cache; passes compiled (CPU) and recorded (CUDA)
    policy, loading, gguf       base model, gated LoRA adapters, value head, optimizer; how they are loaded; GGUF files
    checkpoint, adapters        folders written whole or not at all; adapters from elsewhere, merging
    decode, generate, forward   replies, token by token; one pass over prompts and responses
    quiz, episodes              the quiz; what a task is, and its episodes played
    step                        one PPO update on sampled answers, and both outcomes of a turn ahead of time
    processes, training         several processes; a batch of episodes becomes one step, by PPO or GRPO
    journal, run, terminal      durable lines; the tutor's run on disk; what a person types and sees
    trainer, evaluation, report unattended runs, held-out samples, plots

Imports go one way, downwards in tests/test_house.py's list. Importing this package imports nothing else: a room brings
in torch, transformers and peft where it needs them.
"""
