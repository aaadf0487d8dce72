"""Fixtures shared by the tests. Nothing here or in any test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
if "PYTEST_XDIST_WORKER" in os.environ:  # processes with several threads each would wait for one another, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest_plugins = [
    *("support.decoding", "support.evaluation", "support.reward", "support.session", "support.shell"),
    "support.training",
]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a tiny model, by architecture (see tiny.ARCHITECTURES); built once for the whole session."""
    from support.tiny import save_tiny

    return cache(lambda architecture: save_tiny(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(params=["qwen2", "qwen3", "llama", "mistral", "gemma3", "phi3", "smollm3"])
def folder(request, tiny_folder) -> Path:
    """The folder of a tiny model, for each of tiny.ARCHITECTURES."""
    return tiny_folder(request.param)


@pytest.fixture
def llama(tiny_folder) -> Path:
    """The folder of the tiny Llama."""
    return tiny_folder("llama")


@pytest.fixture
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; tests that need it are left out where it was not fetched."""
    from lora_ppo.settings import SMOLLM2_FOLDER

    if not SMOLLM2_FOLDER.is_dir():
        pytest.skip("SmolLM2 is not here: `make smollm2` fetches it")
    return SMOLLM2_FOLDER


@pytest.fixture
def llama_policy(tiny_folder):
    """A fresh policy on the tiny Llama, with a ChatML template."""
    from support.tiny import tiny_policy

    return tiny_policy(tiny_folder("llama"))
