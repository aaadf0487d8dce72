"""Tokens per second of sampled replies, beside transformers' generate with PEFT's own adapters, in one run, by turns.

    python tools/bench/decode.py model_name=smollm2            both precisions; 1, 16 and 32 replies at once
    python tools/bench/decode.py --dtypes float32 --replies 1  a part of it

Adapters are on, the temperature is 1, no token ends a reply; rates are without the first token. What is compiled is
compiled before, and its seconds are told. The last line, `ratio N`, is that of one reply in the better precision.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402
from lora_ppo.chat import encode_chat  # noqa: E402
from lora_ppo.generate import Request, replies  # noqa: E402
from lora_ppo.loading import load_policy  # noqa: E402
from lora_ppo.policy import Policy  # noqa: E402
from lora_ppo.settings import parse  # noqa: E402
from tools.bench.measure import Arm, race  # noqa: E402
from tools.bench.setup import peft_layers  # noqa: E402

QUESTION = "Why does the moon always show us the same side?"


def by_generate(policy: Policy, prompt: list[int], count: int, seed: int) -> list[list[int]]:
    """`count` replies in one batch by transformers' generate, with its own cache and PEFT's layers."""
    import torch
    from transformers import GenerationConfig

    length = policy.config.max_new_tokens
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=policy.config.top_p,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=-1,
        pad_token_id=policy.pad_id,
        use_cache=True,
    )
    ids = torch.tensor([prompt] * count)
    torch.manual_seed(seed)
    with torch.no_grad(), peft_layers(policy):
        output = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[:, len(prompt) :].tolist()


def measure(config: Config, counts: list[int], tokens: dict[int, int], repeats: int) -> list[dict[str, Any]]:
    """A row for each number of replies at once."""
    policy, config = load_policy(config)
    policy.stop_ids = [-1]
    for name, parameter in policy.parameters.items():  # adapters that say something
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages(QUESTION))
    rows = []
    for count in counts:
        requests, seeds = [Request(prompt, 1.0)] * count, list(range(count))
        ways = {
            "ours": lambda requests=requests, seeds=seeds: replies(policy, requests, seeds),
            "generate": lambda count=count: by_generate(policy, prompt, count, 0),
        }

        def arm(how: str, length: int, ways=ways) -> Arm:
            return Arm(how, lambda _: ways[how](), lambda: setattr(policy.config, "max_new_tokens", length))

        policy.config.max_new_tokens = tokens[count]
        started = time.perf_counter()
        ready(policy, ways["ours"])
        waited = time.perf_counter() - started
        first, whole = ({how: arm(how, n) for how in ways} for n in (1, tokens[count]))
        race([*first.values(), *whole.values()], repeats)
        for how in ways:
            if any(len(ids) != tokens[count] for result in whole[how].results for ids in result):
                raise RuntimeError(f"{how} did not write {tokens[count]} tokens")
        rate = {how: count * (tokens[count] - 1) / (whole[how].median - first[how].median) for how in ways}
        row = {"dtype": config.dtype, "replies": count, "tokens": tokens[count], "tokens/s": rate["ours"]}
        row |= {"generate's": rate["generate"], "ratio": rate["ours"] / rate["generate"]}
        row |= {
            "first token s": first["ours"].median,
            "generate's s": first["generate"].median,
            "ready after s": waited,
        }
        rows.append(row)
        print(
            " | ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )
    return rows


def ready(policy: Policy, write: Callable[[], Any]) -> None:
    """Returns once what the policy compiles is there, and proven."""
    if policy.recorder.compiled:
        policy.recorder.compiled.library.thread.join()
    policy.config.max_new_tokens, length = 8, policy.config.max_new_tokens
    write()
    policy.config.max_new_tokens = length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--replies", nargs="+", type=int, default=[1, 16, 32], help="at once [1 16 32]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options, settings = parser.parse_known_args()
    import torch

    torch.set_num_threads(options.threads)
    tokens = {count: 200 if count == 1 else 48 for count in options.replies}
    rows = []
    for dtype in options.dtypes:
        config = parse(Config, [*settings, f"dtype={dtype}", "device=cpu"])
        rows += measure(config, options.replies, tokens, options.repeats)
    print(f"ratio {max(row['ratio'] for row in rows if row['replies'] == options.replies[0]):.2f}")


if __name__ == "__main__":
    main()
