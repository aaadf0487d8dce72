"""Tasks: what earns the reward, a file or folder each. `lora_ppo.episodes` says what a task is."""
