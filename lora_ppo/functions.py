"""The mathematics of ppo.py, replaced function by function by those of a module of yours (`functions=`).

The library looks these functions up in `lora_ppo.ppo` whenever it calls them, so that a run uses yours everywhere.
"""

import contextlib
import dis
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from lora_ppo.settings import ConfigError

FUNCTIONS = "chosen_logprobs policy_loss value_loss entropy compute_rewards gae ppo_losses minibatch_update".split()


def load_module(name: str) -> ModuleType:
    """The module of a dotted name, or of a .py file, read anew. Raises ConfigError if it can't be imported."""
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise ConfigError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}, is no Python: {error.msg}") from None
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ConfigError(f"{name} can't be imported ({type(error).__name__}: {error})") from None


def unfinished(function: Callable) -> bool:
    """Whether a function, decorated or not, still is a blank that raises NotImplementedError."""
    code = getattr(inspect.unwrap(function), "__code__", None)  # it has nothing that can't be reached
    return code is not None and any(step.argval == "NotImplementedError" for step in dis.get_instructions(code))


def load_functions(name: str) -> dict[str, Callable]:
    """Every function of FUNCTIONS, as the module `name` has it.

    Raises ConfigError if it lacks one, adds one (a public function of its own beside these; imported ones don't
    count), or has not filled one in.
    """
    module = load_module(name)
    lacking = [f for f in FUNCTIONS if not callable(getattr(module, f, None))]
    own = [f for f, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    added = [f for f in own if callable(getattr(module, f)) and not f.startswith("_") and f not in FUNCTIONS]
    blank = [f for f in FUNCTIONS if unfinished(getattr(module, f, None))]
    if lacking:
        raise ConfigError(f"functions={name} lacks {', '.join(lacking)}: it must have {', '.join(FUNCTIONS)}")
    if added:
        raise ConfigError(
            f"functions={name} adds {', '.join(added)}, which is none of the eight: begin the names of helpers with _"
        )
    if blank:
        raise ConfigError(f"functions={name}: {', '.join(blank)} still raise NotImplementedError: fill them in")
    return {f: getattr(module, f) for f in FUNCTIONS}


@contextlib.contextmanager
def replaced(functions: dict[str, Callable]) -> Iterator[None]:
    """In here the library calculates with `functions`."""
    from lora_ppo import ppo

    before = {name: getattr(ppo, name) for name in functions}
    vars(ppo).update(functions)
    try:
        yield
    finally:
        vars(ppo).update(before)
