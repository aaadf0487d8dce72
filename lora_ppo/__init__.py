"""PPO for LoRA adapters on one machine: the library that the tutor, training and evaluation share.

A room is one module. Read step and ppo first: one PPO update, and its equations.

    files, streams              any name, whole or not at all; streams that are full or closed
    settings, statistics        how settings are declared and checked; intervals and tests
    ppo, functions              the mathematics, pure functions of tensors; a module's functions in their place
    chat, prompts               chats as token ids; the roles and what they are told
    layers                      layers that are quicker or keep less
    caches, compiled, recording one pass behind a cache; passes compiled (CPU) and recorded (CUDA)
    policy, loading, gguf       base model, gated LoRA adapters, value head, optimizer; how they are loaded; GGUF files
    stored                      what the files of a model's weights hold
    gate                        what a model's quizzes are worth, as measured
    checks                      whether what was loaded is whole, and can do what a session asks
    checkpoint, adapters        folders written whole or not at all; adapters from elsewhere, merging
    decode, generate, forward   replies, token by token; one pass over prompts and responses
    quiz, quizmaster, episodes  the quiz; how it is written, or not; what a task is, and its episodes played
    step                        one PPO update on sampled answers, and both outcomes of a turn ahead of time
    processes, training         several processes; a batch of episodes becomes one step, by PPO or GRPO
    journal, disk               durable lines, chained by hashes; a run's folder, and disks that refuse
    turns, recovery, run        a run in memory; how it comes back from disk; its life there
    terminal                    what a person types and sees
    signals                     when the program is interrupted, and how it leaves
    trainer, evaluation, report unattended runs, held-out samples, plots
    rewards, watching           reward models on the same base; what tells whether a run learns, and what is meant

Imports go one way, to rooms above in the list of tests/test_house.py. Importing this package imports nothing else: a
room brings in torch, transformers and peft where it needs them.
"""
