"""Sandboxes for tests; where none can be had, the tests that need one are left out and say why."""

from collections.abc import Iterator
from functools import cache

import pytest

from tasks.os_interaction.commands import SandboxFailed
from tasks.os_interaction.limits import Limits
from tasks.os_interaction.sandbox import PACKAGES, Namespaces, missing_tools

SMALL = Limits(memory_mb=96, disk_mb=24, processes=40, inodes=5000)


@cache
def why_no_sandbox() -> str:
    """Why no sandbox can be made here; empty where one can."""
    if missing := missing_tools():
        return f"{', '.join(missing)} missing: {PACKAGES}"
    try:
        Namespaces(SMALL).close()
    except SandboxFailed as failed:
        return f"no sandbox can be made here: {failed}"
    return ""


@pytest.fixture
def sandboxes() -> None:
    """Asks for a machine on which sandboxes can be made."""
    if why := why_no_sandbox():
        pytest.skip(why)


@pytest.fixture
def sandbox(sandboxes) -> Iterator[Namespaces]:
    """A small sandbox, fresh."""
    sandbox = Namespaces(SMALL)
    yield sandbox
    sandbox.close()
