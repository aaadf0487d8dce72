"""What a run survives: kills at random moments, and every known damage to its journal and checkpoints.

    python tools/bench/durability.py                         100 kills and 40 damages of the bundled model's runs
    python tools/bench/durability.py --kills 5 --damages 5 --seed 1

A killed run is started again until it is done, and must then be the run that was never killed: the same weights and
optimizer to the bit, the same log but for times. No turn whose reward was shown may be missing after a kill. A damaged
run is started once: it must stand at the last step that the newest whole checkpoint and the undamaged lines behind it
lead to, no further and not before it, with the weights that it had there. How far that is, is told by comparing the
lines with those of the run before the damage, not by their hashes. All draws are seeded. Exit status 1 after a failure.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from config import Config  # noqa: E402
from lora_ppo.checkpoint import checkpoints, save_checkpoint, sha256  # noqa: E402
from lora_ppo.loading import load_policy  # noqa: E402
from lora_ppo.run import Run  # noqa: E402
from lora_ppo.settings import BUNDLED_MODEL  # noqa: E402

QUESTIONS = ("France", "Norway", "Italy", "Spain", "Japan", "Poland", "Egypt", "Canada")
TENSORS = ("adapter_model.safetensors", "value_head.safetensors", "optimizer.safetensors")


# ------------------------------------------------------------------------------------------------------------- kills


def start(folder: Path, seed: int, steps: int, seconds: float | None = None, every: int = 4) -> bool:
    """Runs the program with a simulated learner, killed after `seconds`; whether it came to its end."""
    child = os.fork()
    if child == 0:
        import lora_ppo_demo

        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        settings = {"learner": "simulated", "questions": folder / "questions", "steps": steps, "seed": seed}
        settings |= {"checkpoint_dir": folder / "c", "log_dir": folder / "l", "save_every": every, "device": "cpu"}
        settings |= {"model_name": BUNDLED_MODEL, "max_new_tokens": 40, "keep_checkpoints": 3 if every > 1 else 1000}
        sys.argv = ["lora_ppo_demo.py", *(f"{name}={value}" for name, value in settings.items())]
        status = 1
        try:
            status = lora_ppo_demo.main()
            sys.stdout.flush()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"exit status {os.WEXITSTATUS(status)}: {(folder / 'output').read_text()[-2000:]}")
    return os.WIFEXITED(status)


def new_folder(place: Path, name: str) -> Path:
    folder = place / name
    folder.mkdir()
    (folder / "questions").write_text("".join(f"What is the capital of {country}?\n" for country in QUESTIONS))
    return folder


def turns_in(journal: Path) -> int:
    """The finished turns of a journal; a last line that is not whole is none."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(json.loads(line)["type"] == "turn" for line in lines)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log's lines without times."""
    lines = map(json.loads, (folder / "l" / "run.log").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("timestamp", "seconds")} for line in lines]


def kill_runs(place: Path, kills: int, steps: int, rng: random.Random, say: Callable[[str], None]) -> list[str]:
    """Kills and restarts runs until `kills` is reached and the last of them is done; the failures, in words."""
    failures, killed, number, restarts = [], 0, 0, Counter()
    while killed < kills:
        seed = rng.randrange(1000)
        reference, folder = new_folder(place, f"whole_{number}"), new_folder(place, f"killed_{number}")
        began = time.perf_counter()
        start(reference, seed, steps)
        longest = (time.perf_counter() - began) / 4
        done = False
        while not done:
            done = start(folder, seed, steps, rng.uniform(0.05, longest) if killed < kills else None)
            killed += not done
            shown = len(re.findall(r"^(Right|Wrong)\. Reward", (folder / "output").read_text(), flags=re.MULTILINE))
            there = turns_in(folder / "c" / "journal.jsonl")
            restarts[number] += 1
            if there < shown:
                failures.append(f"run {number}, kill {killed}: {shown} turns were shown, {there} are there")
        ends = [checkpoints(f / "c")[0] for f in (reference, folder)]
        if ends[0].name != ends[1].name or any(sha256(ends[0] / name) != sha256(ends[1] / name) for name in TENSORS):
            failures.append(
                f"run {number} (seed {seed}) ended at {ends[1].name} with other weights than {ends[0].name}"
            )
        if log_of(reference) != log_of(folder):
            failures.append(f"run {number} (seed {seed}) has another log")
        say(f"run {number}: {restarts[number]} starts to {ends[1].name}")
        number += 1
    say(f"{killed} kills in {number} runs of {steps} steps: {len(failures)} failures")
    return failures


# ----------------------------------------------------------------------------------------------------------- damages


def journal_lines(folder: Path) -> list[bytes]:
    path = folder / "journal.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def rewrite(change: Callable[[list[bytes], random.Random, list[bytes]], Any]) -> Callable:
    """A damage to the journal's lines: `change` alters the list, given another run's."""

    def damage(folder: Path, other: Path, rng: random.Random) -> None:
        lines = journal_lines(folder)
        changed = change(lines, rng, journal_lines(other))
        (folder / "journal.jsonl").write_bytes(b"".join(lines) if changed is None else changed)

    return damage


def swap(lines: list[bytes], rng: random.Random, other: list[bytes]) -> None:
    i, j = rng.sample(range(len(lines)), 2)
    lines[i], lines[j] = lines[j], lines[i]


def double(lines: list[bytes], rng: random.Random, other: list[bytes]) -> None:
    i = rng.randrange(len(lines))
    lines.insert(rng.randint(i, len(lines)), lines[i])


def flip(lines: list[bytes], rng: random.Random, other: list[bytes]) -> None:
    """One digit of a token id."""
    i = rng.choice([i for i, line in enumerate(lines) if b'"response_ids"' in line])
    places = [m.start() for m in re.finditer(rb"\d", lines[i][: lines[i].index(b'"reward"')])]
    at = rng.choice(places[3:])
    digit = b"%d" % ((int(lines[i][at : at + 1]) + rng.randint(1, 9)) % 10)
    lines[i] = lines[i][:at] + digit + lines[i][at + 1 :]


def byte(lines: list[bytes], rng: random.Random, other: list[bytes]) -> bytes:
    data = bytearray(b"".join(lines))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zeros_inside(lines: list[bytes], rng: random.Random, other: list[bytes]) -> bytes:
    data = b"".join(lines)
    at, size = rng.randrange(len(data)), rng.randint(1, 4096)
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def copy_foreign_checkpoint(folder: Path, other: Path, rng: random.Random) -> None:
    source = rng.choice(checkpoints(other))
    number = int(checkpoints(folder)[0].name[5:]) + 1
    for name in {source.name, f"step_{number}"} - {path.name for path in checkpoints(folder)}:
        shutil.copytree(source, folder / name)


def damage_checkpoint(folder: Path, other: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(checkpoints(folder)[0].iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def written_again(lines: list[bytes], rng: random.Random, other: list[bytes]) -> bytes:
    """Every line as tools for JSON write it: the same content with other blanks."""
    separators = rng.choice([(",", ":"), (" , ", " : ")])
    return b"".join(b" %s \n" % json.dumps(json.loads(line), separators=separators).encode() for line in lines)


def remove_checkpoints(folder: Path, other: Path, rng: random.Random) -> None:
    for path in checkpoints(folder):
        shutil.rmtree(path)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "two lines swapped": rewrite(swap),
    "a line twice": rewrite(double),
    "a line missing": rewrite(lambda lines, rng, other: lines.__delitem__(rng.randrange(len(lines)))),
    "cut at any byte": rewrite(lambda lines, rng, other: (d := b"".join(lines))[: rng.randrange(len(d))]),
    "a digit of a token changed": rewrite(flip),
    "a bit flipped": rewrite(byte),
    "a line of another run put in": rewrite(lambda ls, rng, o: ls.insert(rng.randrange(len(ls)), rng.choice(o))),
    "another run's journal behind it": rewrite(lambda lines, rng, other: lines.extend(other)),
    "another run's journal in its place": rewrite(lambda lines, rng, other: b"".join(other)),
    "CRLF": rewrite(lambda lines, rng, other: b"".join(lines).replace(b"\n", b"\r\n")),
    "a byte order mark": rewrite(lambda lines, rng, other: b"\xef\xbb\xbf" + b"".join(lines)),
    "other blanks": rewrite(written_again),
    "zeros at its end": rewrite(lambda lines, rng, other: b"".join(lines) + bytes(rng.randint(1, 4096))),
    "zeros inside": rewrite(zeros_inside),
    "all of it twice": rewrite(lambda lines, rng, other: b"".join(lines * 2)),
    "gone": lambda folder, other, rng: (folder / "journal.jsonl").unlink(),
    "emptied": rewrite(lambda lines, rng, other: b""),
    "another run's checkpoint": copy_foreign_checkpoint,
    "a bit of the newest checkpoint flipped": damage_checkpoint,
    "every checkpoint gone": remove_checkpoints,
}


def wanted_step(folder: Path, original: list[bytes], whole: dict[str, dict[str, str]]) -> int:
    """The step that newest whole checkpoint and undamaged lines lead to. `whole` are the checkpoints' digests."""
    there = set(map(content, journal_lines(folder)))
    bare, newest = list(map(content, original)), -1
    for path in checkpoints(folder):
        if digests(path) == whole.get(path.name):
            place = json.loads((path / "state.json").read_text())["journal"]["sha256"]
            newest = next(i for i, line in enumerate(bare) if json.loads(line)["sha256"] == place)
            break
    while newest + 1 < len(bare) and bare[newest + 1] in there:
        newest += 1
    steps = [json.loads(line)["log"]["step"] for line in bare[: newest + 1] if b'"response_ids"' in line]
    return steps[-1] if steps else 0 if newest >= 0 else -1


def content(line: bytes) -> bytes:
    """What a line says, without its blanks; the line itself if it is no JSON."""
    try:
        return json.dumps(json.loads(line.removeprefix(b"\xef\xbb\xbf"))).encode()
    except ValueError:
        return line


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def resumed(folder: Path, settings: dict[str, Any]) -> tuple[Run, list[str]]:
    """A run as the program begins with it, and what it said."""
    said: list[str] = []
    policy, config = load_policy(Config(checkpoint_dir=str(folder), log_dir=str(folder / "l"), **settings))
    run = Run(policy, config, said.append)
    run.close()
    return run, said


def try_damage(folder: Path, other: Path, reference: Path, name: str, rng: random.Random, settings: dict) -> list[str]:
    """Damages `folder`, a copy of some checkpoints and the journal of `reference`, and starts it; the failures."""
    original = journal_lines(folder)
    whole = {path.name: digests(path) for path in checkpoints(folder)}
    DAMAGES[name](folder, other, rng)
    before = (folder / "journal.jsonl").read_bytes() if (folder / "journal.jsonl").exists() else b""
    wanted = wanted_step(folder, original, whole) if before or checkpoints(folder) else -1
    try:
        run, said = resumed(folder, settings)
    except ValueError as error:  # ConfigError: nothing was there to go on from
        return [f"{name}: refused, and step {wanted} was there ({error})"] if wanted >= 0 else []
    failures = []
    if run.policy.step != wanted:
        failures.append(f"{name}: stands at step {run.policy.step}, expected {wanted}")
    save_checkpoint(folder / "now", run.policy, {}, "")
    same = reference / f"step_{run.policy.step}"
    if not same.exists() or any(sha256(folder / "now" / file) != sha256(same / file) for file in TENSORS):
        failures.append(f"{name}: at step {run.policy.step} with other weights")
    kept = [path.read_bytes() for path in folder.glob("journal*.jsonl")]
    if not any(data.startswith(before) for data in kept):
        failures.append(f"{name}: something of the journal was thrown away")
    again, said_again = resumed(folder, settings)
    save_checkpoint(folder / "again", again.policy, {}, "")
    if any(sha256(folder / "now" / file) != sha256(folder / "again" / file) for file in TENSORS):
        failures.append(f"{name}: the start after it stands elsewhere")
    if repeated := {line for line in said_again if "line" in line and line in said}:
        failures.append(f"{name}: told twice: {repeated}")
    return failures


def a_copy(reference: Path, place: Path, rng: random.Random) -> Path:
    """The journal of a run and some of its checkpoints; the newest step is among them in half of the cases."""
    there = checkpoints(reference)
    last = there[: 1 if rng.random() < 0.5 else 0]
    chosen = {*last, *rng.sample(there[1:], rng.randint(1, 3))}
    place.mkdir()
    shutil.copy(reference / "journal.jsonl", place)
    for path in chosen:
        shutil.copytree(path, place / path.name)
    return place


def damage_runs(place: Path, damages: int, rng: random.Random, say: Callable[[str], None]) -> list[str]:
    """Damages copies of a run, kind after kind; the failures, in words."""
    runs = [new_folder(place, name) for name in ("one", "other")]
    for seed, folder in enumerate(runs):
        start(folder, seed, 12, every=1)
    one, other = (folder / "c" for folder in runs)
    settings = {"device": "cpu", "model_name": str(BUNDLED_MODEL), "max_new_tokens": 40}
    failures, kinds = [], list(DAMAGES)
    for number in range(damages):
        name = kinds[number % len(kinds)]
        failures += try_damage(a_copy(one, place / f"damaged_{number}", rng), other, one, name, rng, settings)
    say(f"{damages} damages of {min(damages, len(kinds))} kinds: {len(failures)} failures")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs [100]")
    parser.add_argument("--damages", type=int, default=40, help="damaged runs [40]")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run that is killed [40]")
    parser.add_argument("--seed", type=int, default=0, help="of moments, places and kinds [0]")
    options = parser.parse_args()
    import torch
    import transformers  # noqa: F401  (before the forks, so that each starts at once)

    torch.set_num_threads(1)  # threads don't survive a fork

    def say(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as place:
        failures = kill_runs(Path(place), options.kills, options.steps, random.Random(options.seed), say)
        failures += damage_runs(Path(place), options.damages, random.Random(options.seed), say)
    for failure in failures:
        say(f"FAILED: {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
