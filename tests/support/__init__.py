"""What tests share: tiny models, an independent oracle of PPO, tasks without a model, scripted sessions."""
