"""Tasks: what earns the reward, a file or folder each. `lora_ppo.episodes` says what a task is.

A module in here that has `TaskSettings` and `prepare` is a task, by its name: `train.py` and `evaluate.py` find it. The
first are the settings that it brings; `prepare(config)` checks them and its data before a model is loaded, and returns
what builds the task from the policy.
"""

import importlib
import pkgutil
from types import ModuleType


def found() -> dict[str, ModuleType]:
    """The tasks that there are."""
    modules = {each.name: importlib.import_module(f"tasks.{each.name}") for each in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "prepare")}
