"""Checks a learner's functions: what they return on the cases, its gradients, and which known mistake gives just that.

A function is right if its results and gradients are the library's, however it is written. A wrong one is compared with
every known mistake (mistakes/), then with every two of them at once.
"""

import contextlib
import inspect
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from exercises.cases import FUNCTIONS, Function
from exercises.mistakes import Mistake, pairs
from exercises.smallest import empty, smallest
from lora_ppo import ppo
from lora_ppo.functions import load_module, unfinished

TITLES = ("log-probabilities", "policy loss", "value loss", "entropy", "rewards and advantages", "minibatch update")
SECONDS = 10.0  # that one call may take
BLANK = "Not filled in yet."
UNKNOWN = "It differs, and this is no mistake that is known here. Compare what is expected with what you got."
INSIDE = "Where the mask is True it is right. Elsewhere it must be 0."
OUTSIDE = "It is right where the mask is True everywhere: something that stands outside the mask has an influence."
PADDING = "NaN spreads from where the mask is False: 0 * NaN is NaN. Use masked_fill or torch.where on what goes in."


class Problem(Exception):
    """A function that gave nothing to compare: what is wrong with it, in one line."""


class TimeUp(BaseException):
    """No Exception, so that a learner's `except Exception` does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp in here after this time; without a limit where there are no signals (outside the main thread)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------ what a function does

Outcome = dict[str, Tensor | None]  # results by name, and gradients; None is: has none


def library(function: Function, inputs: dict[str, Any]) -> Outcome:
    """What is right."""
    return observe(function, getattr(ppo, function.name), inputs, limited=False)  # torch's first step takes a while


def observe(function: Function, tried: Callable, inputs: dict[str, Any], limited: bool = True) -> Outcome:
    """What `tried` returns for these inputs, and its gradients; `limited` to SECONDS. Raises Problem."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in function.trained:
        given[name].requires_grad_()
    try:
        with (
            time_limit(SECONDS if limited else 0),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            returned = function.call(tried, given)
            results = named(function, returned)
            gradients = differentiate(function, given, results)
    except TimeUp:
        raise Problem(f"It does not come back: stopped after {SECONDS:g} seconds.") from None
    except NotImplementedError:
        raise Problem(BLANK) from None
    except Problem:
        raise
    except (Exception, SystemExit) as error:
        raise Problem(told(error, tried)) from None
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not equal(given[name].detach(), value):
            raise Problem(f"It changes its input {name}: work on a copy, or without the methods that end in _.")
    return {name: value.detach() for name, value in results.items()} | gradients


def told(error: BaseException, tried: Callable) -> str:
    """An exception in one line, with the line of the learner's file."""
    file = getattr(getattr(inspect.unwrap(tried), "__code__", None), "co_filename", "")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" (line {lines[-1]} of {os.path.basename(file)})" if lines else ""
    if "backward through the graph a second time" in str(error):
        who = "gradients() does it, and a function that returns a loss leaves it to its caller"
        return f"backward() is called a second time on the same loss: {who}{where}."
    return f"It raises {type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}{where}"


def named(function: Function, returned: Any) -> dict[str, Tensor]:
    """The results by name. Raises Problem if they are no tensors, or not as many."""
    names = function.results
    a_dictionary = function.name in ("ppo_losses", "minibatch_update")
    kind = "a dictionary of" if a_dictionary else f"{len(names)} results:"
    if returned is None:
        raise Problem("It returns None: is there a `return`?")
    if isinstance(returned, dict) and a_dictionary:
        missing = [name for name in names if name not in returned]
        if missing:
            raise Problem(f"What it returns lacks {', '.join(missing)}.")
        results = {name: returned[name] for name in names}
    elif len(names) == 1:
        results = {names[0]: returned}
    elif a_dictionary or not isinstance(returned, tuple | list) or len(returned) != len(names):
        count = len(returned) if isinstance(returned, tuple | list) else 1
        raise Problem(f"It returns {count} result{'s' * (count != 1)}; expected {kind} {', '.join(names)}.")
    else:
        results = dict(zip(names, returned, strict=True))
    for name, value in results.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise Problem(f"{name} is a Python {kind}; expected a tensor.")
        if function.name == "chosen_logprobs" and value.dtype == torch.float64:  # in float32 at least
            results[name] = value.float()
    return results


def differentiate(function: Function, given: dict[str, Any], results: dict[str, Tensor]) -> Outcome:
    """The gradients of the sum of the results (or of the loss among them) by the trained inputs, None without any."""
    wanted = [results[function.loss]] if function.loss else list(results.values())
    roots = [x.sum() for x in wanted if x.requires_grad and x.is_floating_point()]
    inputs = [given[name] for name in function.trained]
    if not roots or not inputs:
        return {f"gradient of {name}": None for name in function.trained}
    found = torch.autograd.grad(sum(roots), inputs, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(x) if grad is None else grad
        for name, x, grad in zip(function.trained, inputs, found, strict=True)
    }


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are the same up to rounding, NaN where the other is NaN."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    rtol = 2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return torch.allclose(a, b, rtol=rtol, atol=1e-5, equal_nan=True)


def agree(a: Outcome | str, b: Outcome | str, without: tuple[str, ...] = ()) -> bool:
    """Whether two outcomes are the same; a string is a problem, and like no other."""
    return isinstance(a, dict) and isinstance(b, dict) and all(equal(a[k], b[k]) for k in b if k not in without)


def outcome(function: Function, tried: Callable, inputs: dict[str, Any]) -> Outcome | str:
    try:
        return observe(function, tried, inputs)
    except Problem as problem:
        return str(problem)


# ---------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Verdict:
    """How a function, or the first of an exercise that fails, did; without `mistake` it passed."""

    exercise: int
    name: str
    mistake: str = ""
    inputs: dict[str, Any] | None = None
    expected: Outcome | None = None
    got: Outcome | None = None

    @property
    def passed(self) -> bool:
        return not self.mistake

    @property
    def blank(self) -> bool:
        return self.mistake == BLANK


def made(function: Function, mistake: Mistake) -> Callable:
    """The function with this mistake in it."""
    return lambda *inputs: function.right(*inputs, **mistake.parts)


def check(function: Function, tried: Callable | None) -> Verdict:
    """Tries a function on its cases."""
    verdict = Verdict(function.exercise, function.name)
    if tried is None:
        return replace(verdict, mistake=f"The file has no function {function.name}.")
    if unfinished(tried):
        return replace(verdict, mistake=BLANK)
    with by_itself(function, tried):
        return judged(function, tried, verdict)


def judged(function: Function, tried: Callable, verdict: Verdict) -> Verdict:
    """`verdict`, with what is wrong in it, if something is."""
    outcomes, expected = [], [library(function, case) for case in function.cases]
    for case in function.cases:
        outcomes.append(outcome(function, tried, case))
        if isinstance(outcomes[-1], str) and "does not come back" in outcomes[-1]:
            return replace(verdict, mistake=outcomes[-1], inputs=case, expected=expected[len(outcomes) - 1])
    wrong = [i for i, (a, b) in enumerate(zip(outcomes, expected, strict=True)) if not agree(a, b)]
    if not wrong:
        return verdict

    inputs = smallest(function.cases[wrong[0]], function.dims, lambda case: not passes(function, tried, case), SECONDS)
    got, right = outcome(function, tried, inputs), library(function, inputs)
    sentence = diagnosis(function, tried, outcomes, expected, wrong)
    return replace(verdict, mistake=sentence, inputs=inputs, expected=right, got=got if isinstance(got, dict) else None)


def diagnosis(function: Function, tried: Callable, outcomes: list, expected: list[Outcome], wrong: list[int]) -> str:
    """The mistake that gives exactly these outcomes, in a sentence."""
    cases, asides = function.cases, function.asides
    if problem := next((o for o in outcomes if isinstance(o, str)), ""):
        left_out = "response_mask" in function.dims and all(empty(cases[i]["response_mask"]) for i in wrong)
        return f"Where an answer is left out, its row False everywhere: {problem}" if left_out else problem
    if all(has_nan(cases[i]) for i in wrong) and all(passes(function, tried, without_nan(case)) for case in cases):
        return PADDING

    def gives(mistake: Mistake, places: list[int], without: tuple[str, ...]) -> bool:
        wanted = made(function, mistake)
        return all(agree(outcome(function, wanted, cases[i]), outcomes[i], without) for i in places)

    every = sorted(range(len(cases)), key=lambda i: i not in wrong)  # those that tell most first
    # Where NaN is in the padding, many a mistake looks like another.
    plain = [i for i in every if not has_nan(cases[i])]

    def readings() -> Iterator[tuple[Iterable[Mistake], list[int], tuple[str, ...]]]:
        """Mistakes that it may be, the cases to look at, and results to leave out, the best explanation first."""
        yield function.mistakes, every, ()
        yield function.mistakes, plain, ()
        right_in_training = all(agree(outcomes[i], expected[i], asides) for i in plain)
        if not right_in_training:  # more is wrong than what only the log needs
            matter = [m for m in function.mistakes if not gives_right(function, m, expected, asides)]
            yield matter, plain, asides
            yield pairs(matter), plain, asides

    for mistakes, places, without in readings():
        if found := next((m for m in mistakes if gives(m, places, without)), None):
            return found.sentence
    return shape_of(outcomes[wrong[0]], expected[wrong[0]]) or half_right(function, outcomes, expected) or UNKNOWN


def half_right(function: Function, outcomes: list[Outcome], expected: list[Outcome]) -> str:
    """What is right about a function with a mistake that is not known, in a sentence; empty if nothing is."""
    both = list(zip(function.cases, outcomes, expected, strict=True))
    if function.asides and all(agree(a, b, function.asides) for _, a, b in both):
        wrong = [name for name in function.asides if not all(equal(a[name], b[name]) for _, a, b in both)]
        return f"The loss and its gradient are right. What the log is told is not: {', '.join(wrong)}."
    if "response_mask" not in function.dims:
        return ""
    if all(agree(inside(a, case), inside(b, case)) for case, a, b in both):
        return INSIDE
    return OUTSIDE if all(agree(a, b) for case, a, b in both if case["response_mask"].all()) else ""


def inside(result: Outcome, case: dict[str, Any]) -> Outcome:
    """The outcome with zeros where the mask is False, of results that are (B, T)."""
    mask = case["response_mask"]
    return {k: x.masked_fill(~mask, 0.0) if x is not None and x.shape == mask.shape else x for k, x in result.items()}


def passes(function: Function, tried: Callable, inputs: dict[str, Any]) -> bool:
    """Whether a function is right on these inputs, or they are none for it."""
    right = outcome(function, getattr(ppo, function.name), inputs)
    return isinstance(right, str) or agree(outcome(function, tried, inputs), right)


def gives_right(function: Function, mistake: Mistake, expected: list[Outcome], without: tuple[str, ...]) -> bool:
    """Whether a mistake shows only in results that don't count."""
    outcomes = (outcome(function, made(function, mistake), case) for case in function.cases)
    return all(agree(a, b, without) for a, b in zip(outcomes, expected, strict=True))


def shape_of(got: Outcome, expected: Outcome) -> str:
    """What is wrong with the form of a result, in one line; empty if it is the numbers."""
    for name, right in expected.items():
        value = got[name]
        if value is None and right is not None:
            return f"The result has no {name}: .detach(), .item(), no_grad or a new tensor cut it off."
        if value is not None and right is None:
            return (
                f"There is a {name.replace('gradient of', 'gradient through')}: what was earned is a number, detach it."
            )
        if value is not None and value.shape != right.shape:
            return f"{name} has shape {tuple(value.shape)}; expected {tuple(right.shape)}."
        if value is not None and value.dtype != right.dtype:
            return f"{name} is {str(value.dtype)[6:]}; expected {str(right.dtype)[6:]}."
    return ""


def has_nan(case: dict[str, Any]) -> bool:
    return any(isinstance(x, Tensor) and bool(x.isnan().any()) for x in case.values())


def without_nan(case: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.nan_to_num(0.0) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in case.items()
    }


def check_exercise(number: int, module: ModuleType) -> Verdict:
    """The verdict on an exercise: that on its first function that fails, a blank last, or that it passed."""
    mine = [function for function in FUNCTIONS if function.exercise == number]
    verdicts = [check(function, getattr(module, function.name, None)) for function in mine]
    failed = sorted((v for v in verdicts if not v.passed), key=lambda v: v.blank)
    return failed[0] if failed else verdicts[-1]


@contextlib.contextmanager
def by_itself(function: Function, tried: Callable) -> Iterator[None]:
    """In here what `tried` calls of other exercises are the library's functions: each is checked by itself."""
    space = getattr(inspect.unwrap(tried), "__globals__", {})
    names = [f.name for f in FUNCTIONS if f.exercise != function.exercise and f.name in space]
    before = {name: space[name] for name in names}
    space.update({name: getattr(ppo, name) for name in names})
    try:
        yield
    finally:
        space.update(before)


def check_all(file: str) -> Iterator[Verdict]:
    """The six verdicts on a file. Raises ConfigError if it can't be imported."""
    try:
        with time_limit(60.0), contextlib.redirect_stdout(sys.stderr):
            module = load_module(file)
    except TimeUp:
        from lora_ppo.settings import ConfigError

        raise ConfigError(f"{file} can't be imported: it does not come back within a minute") from None
    for number in range(len(TITLES)):
        yield check_exercise(number, module)
