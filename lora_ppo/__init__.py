"""PPO for LoRA adapters on one machine: the library that the tutor, training, evaluation and the course share.

A room is one module, and imports go one way, from the first line of this list to the last:

    training, journal       a batch of answers; a run's life on disk: turns, undo, replay
    step                    one PPO update: read this one first, beside ppo
    quiz, episodes          what earns the reward
    forward                 one pass over prompts and responses: log-probabilities, values, logits
    decode, generate        replies, token by token
    recording, layers       passes recorded and played; layers that are quicker or keep less
    checkpoint, terminal    files written whole or not at all; what a person types and sees
    policy, chat            the base model, its LoRA adapters and value head; chats as token ids
    ppo, settings           the mathematics, pure functions; how settings are declared and checked

Importing it imports nothing else: a room brings in torch, transformers and peft where it needs them.
"""
