"""Benchmarks whose programs run in the tests' own process."""

import sys
from pathlib import Path

from lora_ppo.settings import ConfigError


def programs_here(monkeypatch, capsys, programs, calls):
    """What stands in for `runs.call`: runs a program's `main` here, and notes its name in `calls`."""

    def call(command, folder=None, log=None):
        calls.append(Path(command[1]).name)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            if programs[calls[-1]].main():
                raise ConfigError(capsys.readouterr().err.strip())
        if folder:
            (folder / "cost.json").write_text('{"wall_seconds": 60.0, "peak_mb": 2.0}')

    return call
