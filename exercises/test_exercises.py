"""The six exercises as tests: `pytest exercises`. The project's own tests don't collect this folder."""

import importlib

import pytest

from exercises.harness import TITLES, check_exercise
from exercises.screen import explained


@pytest.mark.parametrize("number", range(len(TITLES)), ids=[f"{i}-{t.replace(' ', '_')}" for i, t in enumerate(TITLES)])
def test_exercise(number, request):
    name = "solutions" if request.config.getoption("--solutions", default=False) else "ppo"
    verdict = check_exercise(number, importlib.import_module(f"exercises.{name}"))
    if not verdict.passed:
        pytest.fail(explained(verdict).plain, pytrace=False)
