"""The PPO course: six exercises, in `ppo.py`; `python -m exercises` checks them. Start with README.md."""
