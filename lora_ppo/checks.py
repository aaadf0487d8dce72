"""What is looked at once, when a model is loaded: whether it is whole, and can do all that a session will ask of it.

What can't be done is one line at the start, a ConfigError, instead of noise or a traceback at the first question.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import control_ids, encode_chat
from lora_ppo.generate import Request, replies
from lora_ppo.policy import Policy
from lora_ppo.prompts import ROLES
from lora_ppo.quiz import quiz_json
from lora_ppo.quizmaster import QuizGrammar, opening
from lora_ppo.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


LOOKS_AHEAD = 0.1  # of the largest logit; what rounding makes of the company that a token is read in is far less
INSTEAD = "get the model again, or name another"
# The roles that a task asks. Any other task asks the one of its name, if there is one.
ASKED = {"quiz": ("tutor", "quizmaster", "solver", "learner"), "voice": ("tutor",)}
SAMPLE = quiz_json("What is 2 + 2?", "4", ["3", "5", "22"])


def check_loaded(found: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError unless each tensor of the model came from its files, and each one of those went into it.

    `found` is what transformers tells of the loading. A head that is tied to the embeddings needs no tensor.
    """
    misshapen = {key: f"{tuple(stored)}, expected {tuple(wanted)}" for key, stored, wanted in found["mismatched_keys"]}
    for keys, what in (
        (misshapen, "a tensor of another shape than config.json says"),
        (found["missing_keys"], "no tensor"),
        (found["unexpected_keys"], "a tensor that config.json has no place for"),
    ):
        if keys:
            first, more = min(keys), f", and {len(keys) - 1} more such" if len(keys) > 1 else ""
            shape = f" ({misshapen[first]})" if keys is misshapen else ""
            raise ConfigError(f"model_name={name}: its weights hold {what}: {first}{shape}{more}; {INSTEAD}")


def check_weights(model, name: str) -> None:
    """Raises ConfigError if a weight is NaN or infinite.

    -inf is right in the bias of a head, where it pads the vocabulary, and in a buffer, which may be a mask.
    """
    import torch

    padding = getattr(model.get_output_embeddings(), "bias", None)
    masks = {id(x) for x in (padding, *model.buffers())}
    for key, weight in itertools.chain(model.named_parameters(), model.named_buffers()):
        # A sum that is finite has finite parts, and takes less time than to look at each.
        if weight.is_floating_point() and not weight.detach().sum(dtype=torch.float32).isfinite():
            broken = weight[~(weight < math.inf) if id(weight) in masks else ~weight.isfinite()]
            if len(broken):
                raise ConfigError(f"model_name={name}: {key} holds {broken[0].item()}; {INSTEAD}")


def check_policy(policy: Policy) -> None:
    """Does once what every turn will: encodes the prompts of all roles, builds the quiz's grammar, reads and writes.

    Raises ConfigError with what can't be done, and why.
    """
    name = policy.config.model_name
    if not policy.stop_ids:
        raise ConfigError(f"model_name={name} has no end token: set eos_token_id in its generation_config.json")
    task = getattr(policy.config, "task", "quiz")
    quizzes = task == "quiz"
    prompts = attempt(name, "encode a prompt", lambda: encoded_prompts(policy))
    for role, ids in prompts.items():
        if role in ASKED.get(task, (task,)) and len(ids) + policy.config.max_new_tokens > policy.context:
            raise ConfigError(
                f"max_new_tokens={policy.config.max_new_tokens} leaves no room in a context of {policy.context} "
                f"tokens: the {role}'s prompt takes {len(ids)}; lower it, or set prompts=FILE with shorter ones"
            )
    if quizzes:
        attempt(name, "write a quiz under a grammar", lambda: check_grammar(policy))
    attempt(name, "read a token", lambda: check_logits(policy, prompts["tutor"]))
    attempt(name, "write a reply", lambda: check_reply(policy, prompts["tutor"]))


def attempt(name: str, what: str, do: Callable[[], Any]) -> Any:
    """What `do` returns. Whatever it raises becomes one line: what can't be done, and why."""
    try:
        return do()
    except ConfigError:
        raise
    except Exception as error:  # the model's code, its tokenizer and its template raise what they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"model_name={name} can't {what} ({reason}): name another model") from error


def encoded_prompts(policy: Policy) -> dict[str, list[int]]:
    """Each role's prompt for the shortest of questions, as token ids."""
    text = set(policy.tokenizer.get_vocab().values()) - control_ids(policy.tokenizer)
    if (tokens := max(text, default=0) + 1) > policy.vocabulary:  # any text may be asked
        raise ValueError(f"its tokenizer has {tokens} tokens, its head {policy.vocabulary}")
    prompts = {role: first_read(policy, role, "?") for role in ROLES}
    for role, ids in prompts.items():
        if not ids or max(ids) >= policy.vocabulary:
            found = f"token {max(ids)}" if ids else "nothing"
            raise ValueError(f"the {role}'s has {found}, and the model knows tokens below {policy.vocabulary}")
    return prompts


def longest_prompt(policy: Policy, question: str, roles: Sequence[str]) -> int:
    """The tokens of the longest of the prompts in which these roles are told a question: a quiz asks it again."""
    return max(len(first_read(policy, name, question)) for name in roles)


def first_read(policy: Policy, role: str, question: str) -> list[int]:
    """What a role that is asked a question reads before it writes."""
    if role == "quizmaster":
        return opening(policy, question)
    return encode_chat(policy.tokenizer, getattr(policy.prompts, role).messages(question))


def check_grammar(policy: Policy) -> None:
    """Raises ValueError unless the tokenizer can write a quiz as the grammar wants it."""
    ids = policy.ll_tokenizer.tokenize_str(SAMPLE)  # its own way: others put a space before a text
    written = policy.tokenizer.decode(ids)
    if written != SAMPLE or QuizGrammar(policy, 0).matcher.validate_tokens(ids) < len(ids):
        raise ValueError(f"its tokenizer makes {written[:60]!r} of one")


def check_logits(policy: Policy, tokens: Sequence[int]) -> None:
    """Raises ValueError unless the logits at one token make a distribution, whatever stands behind it."""
    import torch

    first, second, third = (tokens[i % len(tokens)] for i in range(3))
    ids = torch.tensor([[first, second], [first, third]], device=policy.device)
    with torch.no_grad():
        logits, _ = policy.read(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([0], device=policy.device))
    if logits.shape != (2, 1, policy.vocabulary):
        raise ValueError(f"its logits are {tuple(logits.shape)}, expected {(2, 1, policy.vocabulary)}")
    if not (logits < math.inf).all() or logits.isneginf().all():  # NaN is smaller than nothing; -inf pads a vocabulary
        raise ValueError("its logits are not finite")
    real = logits[..., logits.isfinite().all(0).flatten()]
    if (real[0] - real[1]).abs().max() > LOOKS_AHEAD * real.abs().max():
        raise ValueError("what it makes of a token depends on the next ones")


def check_reply(policy: Policy, prompt: Sequence[int]) -> None:
    """Has policy and base model write a reply side by side: a token of the prompt, then the end, as a grammar wants."""
    first = next(token for token in prompt if token not in policy.stop_ids)
    wanted, begun = [first, policy.end_id][: policy.config.max_new_tokens], list(prompt[:2])

    def only(ids: "Tensor", scores: "Tensor") -> "Tensor":
        allowed = scores.new_full(scores.shape, -math.inf)
        allowed[:, wanted[ids.shape[1] - len(begun)]] = 0.0
        return allowed

    written = replies(policy, [Request(begun, 1.0, adapter=on, grammar=only) for on in (True, False)], seeds=[0, 0])
    if written != [wanted] * 2:
        raise ValueError(f"it wrote {written} where only {wanted} was allowed")
