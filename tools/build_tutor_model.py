"""Builds `models/tutor-tiny`, the bundled model, from scratch.

    python tools/build_tutor_model.py                 train (or go on with) the model and write it
    python tools/build_tutor_model.py --evaluate      print its figures on phrasings that never occur in training

A Llama of 7.7 million parameters learns every role the program has from conversations that `tools/corpus` makes out
of the tables in `data/`. Those of one role are packed into rows of ROW_TOKENS behind their one system prompt, each
seeing it and itself; some rows are drills in arithmetic. The loss is on the replies. Hidden matrices learn with Muon
(Jordan 2024), the rest with AdamW, under a constant rate that decays linearly at the end; two short stages add words,
guesses and spellings that the first lacks. The work folder keeps the run's state: the command goes on where it stopped.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lora_ppo.settings import BUNDLED_MODEL, PROMPTS_FILE  # noqa: E402
from tools.corpus import drill, example  # noqa: E402

ROW_TOKENS = 256
ROWS = 32
MUON_LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.01
WARMUP_STEPS, DECAY_SHARE = 50, 0.45
LATER_STAGES, LATER_RATE = (3417, 3869), 0.3  # steps at which `corpus.wording` and `corpus.spelling` join; their rate
SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(seed: int, vocab_size: int = 4096, samples: int = 60_000):
    """A byte-level BPE with single digits, learnt from the corpus itself; no text is out of its reach."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    texts = (text for _ in range(samples) for made in [example(rng)] for text in (made.system, made.user, made.reply))
    bpe = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:4]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def new_model(tokenizer, seed: int):
    """The bundled architecture with fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=320,
            intermediate_size=896,
            num_hidden_layers=5,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=False,
        )
    )


class Packer:
    """Turns the endless stream of examples into batches of ROWS rows; its state can be saved and restored.

    A conversation is (system, tokens, weights): the ids of its system prompt, those of the rest, and what each of the
    rest weighs in the loss.
    """

    WAITING = 192  # conversations to choose from, so that a row finds enough of one role

    def __init__(self, tokenizer, seed: int):
        self.rng, self.made_of = random.Random(seed), made_of(seed)
        self.step = 0  # of the build
        self.pending: list[tuple[list[int], list[int], list[float]]] = []
        vocabulary = tokenizer.convert_tokens_to_ids
        self.system, self.user, self.assistant, self.end = map(vocabulary, SPECIAL_TOKENS[1:])
        self.encode = lambda text: tokenizer._tokenizer.encode(text, add_special_tokens=False).ids

    def encoded(self, example) -> tuple[list[int], list[int], list[float]]:
        system = [self.system, *self.encode(example.system), self.end]
        prompt = [self.user, *self.encode(example.user), self.end, self.assistant]
        reply = [*self.encode(example.reply), self.end]
        return system, prompt + reply, [0.0] * len(prompt) + [example.weight] * len(reply)

    def row(self) -> list[tuple[list[int], list[int], list[float]]]:
        """The oldest conversation that waits, and others with its system prompt that fit into the row beside it."""
        if self.rng.random() < drill.SHARE:
            if self.rng.random() < drill.LINES_SHARE:
                system, tokens, weights = drill.conversation(self)
                room = ROW_TOKENS - len(system)
                return [(system, tokens[:room], weights[:room])]
            self.pending[:0] = [self.encoded(example) for example in drill.roles(self.rng, count=6)]
        while len(self.pending) < self.WAITING:
            self.pending.append(self.encoded(example(self.rng, stage_of(self.step))))
        shared = self.pending[0][0]
        room, chosen, left = ROW_TOKENS - len(shared), [], []
        for item in self.pending:
            fits = item[0] == shared and len(item[1]) <= room
            (chosen if fits else left).append(item)
            room -= len(item[1]) * fits
        self.pending = left
        return chosen

    def batch(self, rows: int = ROWS) -> dict:
        return collate([self.row() for _ in range(rows)])

    def state(self) -> dict:
        return {"rng": self.rng.getstate(), "pending": self.pending}

    def restore(self, state: dict) -> None:
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.pending = [tuple(item) for item in state["pending"]]


def collate(rows, row_tokens: int = ROW_TOKENS, lightest: float = 0.1) -> dict:
    """Packed rows as tensors: behind a row's system prompt stand its conversations, each blind to the others.

    `at` are the flat positions whose next token weighs at least `lightest`, `labels` those tokens, `weights` what they
    weigh, `conversation` which conversation of the batch they belong to. Positions go on from the system prompt in
    each conversation, so that it is computed as if it stood alone.
    """
    import torch

    shared, padding = -1, -2
    ids = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, padding)
    at, labels, weights, conversation = [], [], [], []
    count = 0
    for r, row in enumerate(rows):
        system = row[0][0]
        start = len(system)
        ids[r, :start] = torch.tensor(system)
        positions[r, :start] = torch.arange(start)
        segments[r, :start] = shared
        for _, tokens, token_weights in row:
            end = start + len(tokens)
            ids[r, start:end] = torch.tensor(tokens)
            positions[r, start:end] = torch.arange(len(system), len(system) + len(tokens))
            segments[r, start:end] = count
            for i, weight in enumerate(token_weights):
                if weight >= lightest:
                    at.append(r * row_tokens + start + i - 1)
                    labels.append(tokens[i])
                    weights.append(weight)
                    conversation.append(count)
            start, count = end, count + 1
    keys = segments[:, None, :]
    visible = (keys == segments[:, :, None]) | (keys == shared)
    causal = torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    return {
        "ids": ids,
        "positions": positions,
        "mask": (visible & causal)[:, None],
        "at": torch.tensor(at),
        "labels": torch.tensor(labels),
        "weights": torch.tensor(weights),
        "conversation": torch.tensor(conversation),
    }


def reply_logits(model, batch):
    """Logits (N, V) in float32 at the positions `batch["at"]` alone."""
    hidden = model.model(
        input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch["at"]]).float()


def stage_of(step: int) -> int:
    return sum(step >= first for first in LATER_STAGES)


def learning_rate_share(step: int, steps: int) -> float:
    """Warm-up, constant, linear decay over the last DECAY_SHARE of the first stage; then twice LATER_RATE, decaying."""
    stage = stage_of(step)
    end = min((steps, *LATER_STAGES[stage : stage + 1]))
    if stage:
        return LATER_RATE * (end - step) / (end - LATER_STAGES[stage - 1])
    steps = end
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def optimizers_for(model):
    import torch

    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save_state(work: Path, model, optimizers, packer, step: int) -> None:
    """Writes the run's state into one file: the old one stays until the new is whole."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for number, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in slots.items()}
    rest = {"step": str(step), "packer": json.dumps(packer.state()), "made_of": packer.made_of}
    new = work / "state.safetensors.new"
    save_file({k: v.contiguous() for k, v in tensors.items()}, new, metadata=rest)
    new.replace(work / "state.safetensors")


def load_state(work: Path, model, optimizers, packer) -> int:
    """Restores what `save_state` wrote and returns the number of steps done; 0 where there is nothing to restore.

    Exits with one line if that was made from another seed, corpus or data.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = work / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        rest = file.metadata()
    if rest["made_of"] != packer.made_of:
        sys.exit(f"error: {work} holds a build from another seed, corpus or data: remove it, or set --work")
    tensors = load_file(path)
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                _, _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(state)
    packer.restore(json.loads(rest["packer"]))
    return int(rest["step"])


def made_of(seed: int) -> str:
    """A digest of all that the training conversations follow from."""
    digest = hashlib.sha256(str(seed).encode())
    sources = [*ROOT.glob("tools/corpus/*.py"), *ROOT.glob("data/**/*.*"), ROOT / "tasks" / "facts.py"]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def train(args) -> None:
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import AutoTokenizer

    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if (work / "tokenizer" / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    else:
        tokenizer = train_tokenizer(args.seed)
        tokenizer.save_pretrained(work / "tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(tokenizer, args.seed).to(device)
    optimizers = optimizers_for(model)
    packer = Packer(tokenizer, args.seed)
    first = load_state(work, model, optimizers, packer)
    steps = int(args.tokens) // (ROW_TOKENS * ROWS)

    def loss_of(batch):
        with in_bfloat16(device.type):
            logits = reply_logits(model, batch)
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return (losses * batch["weights"]).sum() / batch["weights"].sum()

    compiled = loss_of if args.no_compile else torch.compile(loss_of, dynamic=None)
    log = (work / "build.log").open("a", encoding="utf-8")
    probe = held_out_batches(tokenizer)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=steps, completed=first, text="compiling")
        started, recent = time.perf_counter(), []
        for step in range(first, steps):
            packer.step = step
            batch = {k: v.to(device) for k, v in packer.batch().items()}
            for key in ("at", "labels", "weights"):
                torch._dynamo.maybe_mark_dynamic(batch[key], 0)
            share = learning_rate_share(step, steps)
            for optimizer, rate in zip(optimizers, (MUON_LR, ADAMW_LR), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
            loss = compiled(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent.append(loss.item())
            progress.update(bar, completed=step + 1, text=f"loss {recent[-1]:.3f}")
            if (step + 1) % 20 == 0:
                seconds = (time.perf_counter() - started) / len(recent)
                line = {"step": step + 1, "loss": round(sum(recent) / len(recent), 4)}
                line |= {"tokens_per_second": round(ROW_TOKENS * ROWS / seconds), "rate": round(share, 3)}
                if (step + 1) % args.probe_every == 0:
                    line |= probe_figures(model, tokenizer, probe)
                print(json.dumps(line), file=log, flush=True)
                started, recent = time.perf_counter(), []
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                save_state(work, model, optimizers, packer, step + 1)
    write_model(model, tokenizer, Path(args.output))


def in_bfloat16(device: str):
    """Products in bfloat16, where the device has instructions for them: elsewhere they are far slower."""
    import torch

    from lora_ppo.loading import multiplies_bfloat16

    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or multiplies_bfloat16())


def held_out_batches(tokenizer, seed: int = 1, facts: int = 256):
    """Fixed conversations in held-out phrasings, by role, for the curve in the log."""
    from lora_ppo.quiz import learner_text, quiz_json
    from tools.corpus import solver, tutor
    from tools.corpus.base import Example, any_fact, prompts, shuffled

    rng = random.Random(seed)
    packer = Packer(tokenizer, seed)
    by_role = {"clear": [], "quiz": [], "quiz_arithmetic": [], "solver": [], "reader": [], "evasive": []}
    for _ in range(facts):
        fact = any_fact(rng)
        question = fact.question(rng.choice(fact.subject.held_out))
        options = shuffled(fact.options, rng)
        by_role["clear"].append(Example(prompts().tutor.system, question, fact.statement))
        kind = "quiz_arithmetic" if fact.subject.key == "arithmetic" else "quiz"
        by_role[kind].append(
            Example(prompts().quizmaster.system, question, quiz_json(fact.quiz_question, fact.answer, fact.wrong))
        )
        by_role["solver"].append(solver.solving(fact.quiz_question, fact.answer, fact.wrong, rng))
        for role, text in (("reader", tutor.clear(fact.statement, rng)), ("evasive", tutor.evasive(rng))):
            by_role[role].append(
                Example(prompts().learner.system, learner_text(text, fact.quiz_question, options), fact.answer)
            )
    batches = {}
    for role, items in by_role.items():
        encoded = [packer.encoded(item) for item in items]
        longest = max(len(system) + len(tokens) for system, tokens, _ in encoded)
        batches[role] = collate([[item] for item in encoded], longest, lightest=1.0)
    return batches


def probe_figures(model, tokenizer, batches) -> dict:
    """Share of held-out conversations whose every reply token is the most probable one, by role."""
    import torch

    figures = {}
    with torch.no_grad(), in_bfloat16(model.device.type):
        for role, batch in batches.items():
            batch = {k: v.to(model.device) for k, v in batch.items()}
            logits = reply_logits(model, batch)
            wrong = logits.argmax(-1) != batch["labels"]
            if role == "clear":
                first = torch.cat([wrong.new_ones(1), batch["conversation"].diff() != 0])
                heads = logits[first].softmax(-1)
                clear, evasive = (
                    [tokenizer.encode(w)[0] for w in words]
                    for words in (("The", "Here", "In"), ("That", "There", "Many"))
                )
                total = heads[:, clear].sum(-1) / heads[:, clear + evasive].sum(-1)
                figures["clear_probability"] = round(total.mean().item(), 3)
                wrong = wrong & ~first
            failed = torch.zeros(int(batch["conversation"].max()) + 1, device=wrong.device)
            failed.index_add_(0, batch["conversation"], wrong.float())
            figures[role] = round((failed == 0).float().mean().item(), 3)
    return figures


def write_model(model, tokenizer, output: Path) -> None:
    """The finished model in bf16, as any transformers program loads it."""
    import torch

    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    if output.resolve() != BUNDLED_MODEL:
        shutil.copy(BUNDLED_MODEL / PROMPTS_FILE, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(BUNDLED_MODEL), help="where the model is written")
    parser.add_argument("--work", default=str(ROOT / "build" / "tutor-tiny"), help="state and log of the run")
    parser.add_argument("--tokens", type=float, default=34.2e6, help="length of the training, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--probe_every", type=int, default=100, help="steps between figures in the log")
    parser.add_argument("--no_compile", action="store_true", help="don't use torch.compile")
    parser.add_argument("--evaluate", action="store_true", help="only measure the finished model")
    parser.add_argument("--samples", type=int, default=400, help="facts that --evaluate asks about")
    args = parser.parse_args()
    from tools.tutor_figures import evaluate

    if not args.evaluate:
        train(args)
    figures = evaluate(Path(args.output), args.samples, args.seed)
    if not args.evaluate:
        with (Path(args.work) / "build.log").open("a", encoding="utf-8") as log:
            print(json.dumps(figures), file=log)


if __name__ == "__main__":
    main()
