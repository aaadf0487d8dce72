"""What shell tasks cost: making a sandbox, a command, episodes a second through the server; and kills.

    python tools/bench/shell.py cost                     milliseconds a sandbox and a command, beside a bare bash
    python tools/bench/shell.py server [--at-once 16]    episodes a second through a server process
    python tools/bench/shell.py kill [--times 20]        kill -9 of the server at random moments: what is left behind
    python tools/bench/shell.py kill-trainer [--times 20]        the same of train.py, which then goes on to its end

A server process of its own is started on a free port for `server` and `kill`; `kill-trainer` plays without one. No
other episodes may be played on the machine meanwhile: theirs would be taken for what is left behind.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from lora_ppo.checkpoint import Damaged, verify_checkpoint  # noqa: E402
from lora_ppo.settings import BUNDLED_MODEL  # noqa: E402
from tasks.os_interaction.client import RemoteEntry, Server  # noqa: E402
from tasks.os_interaction.entries import OWN, read_entries  # noqa: E402
from tasks.os_interaction.episode import FINISH, bash_reply  # noqa: E402
from tasks.os_interaction.limits import cgroup_parents  # noqa: E402
from tasks.os_interaction.sandbox import Namespaces  # noqa: E402


def median_ms(function: Callable[[], object], times: int = 50) -> float:
    """The median of so many calls, in milliseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def cost() -> None:
    sandbox = Namespaces()
    print(f"a sandbox, made and closed   {median_ms(lambda: Namespaces().close(), 20):6.1f} ms")
    print(f"a command in it (true)       {median_ms(lambda: sandbox.run('true')):6.1f} ms")
    print(f"the check (true)             {median_ms(lambda: sandbox.check('true')):6.1f} ms")
    print(f"bash -c true without it      {median_ms(lambda: subprocess.run(['bash', '-c', 'true'])):6.1f} ms")
    sandbox.close()


def start(*words: str) -> tuple[subprocess.Popen, str]:
    """A server on a free port, under the settings `words`, and its URL. Ctrl-C is its clients': it ends after them."""
    with tempfile.NamedTemporaryFile("w") as log:
        command = [sys.executable, "-m", "tasks.os_interaction.server", "port=0", *words]
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True)
        try:
            while " serves " not in (said := Path(log.name).read_text()):
                if process.poll() is not None:
                    raise SystemExit(said)
                time.sleep(0.1)
        except BaseException:
            process.terminate()
            raise
    return process, next(line for line in said.splitlines() if " serves " in line).split()[0]


def episode(server: Server, entry: RemoteEntry, truth: str) -> str:
    """Plays an entry's ground truth; returns the verdict."""
    one = server.episode(entry)
    one.reset()
    one.step(bash_reply(truth))
    one.step(FINISH)
    return one.outcome().verdict


def through_server(at_once: int) -> None:
    process, url = start()
    truths = {entry.name: entry.truth for entry in read_entries(OWN)}
    try:
        server = Server(url)
        entries = server.samples()
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            verdicts = list(pool.map(lambda entry: episode(server, entry, truths[entry.name]), entries))
        seconds = time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()
    counts = {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}
    print(f"{len(entries)} episodes, {at_once} at once: {len(entries) / seconds:.1f} a second; {json.dumps(counts)}")


def left_behind(pid: int) -> list[str]:
    """What a program with this id left: cgroups, processes of its sandboxes, mounts in them."""
    cgroups = [str(path) for parent in cgroup_parents().values() for path in parent.glob(f"lora_ppo-{pid}-*")]
    said = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout
    programs = [line for line in said.splitlines() if line.startswith(("bwrap", "nsenter")) or f"-{pid}-" in line]
    mounts = set()
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            mounts |= {f"{path}: {line}" for line in path.read_text().splitlines() if " - tmpfs sandbox " in line}
    return cgroups + programs + sorted(mounts)


def kills(times: int) -> None:
    rng, left, place = random.Random(0), [], Path(tempfile.gettempdir())
    there = set(place.glob("lora_ppo*"))
    for number in range(times):
        process, url = start()
        server = Server(url)
        server.wait = lambda abandoned: (_ for _ in ()).throw(SystemExit)  # this one will not come back
        entries = server.samples()
        with ThreadPoolExecutor(8) as pool:
            plays = [pool.submit(server.episode(entries[i]).reset) for i in range(8)]
            commands = "touch /x; sleep 30"
            plays += [pool.submit(episode, server, entry, commands) for entry in entries[:8]]
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
            for one in plays:
                one.exception()
        time.sleep(2)
        found = left_behind(process.pid) + [str(path) for path in {*place.glob("lora_ppo*")} - there]
        left += found
        print(f"kill {number + 1}: {found or 'nothing left'}", flush=True)
    print(f"{times} kills, {len(left)} things left behind")


EPOCHS = 6
TINY = f"task=os_interaction model_name={BUNDLED_MODEL} device=cpu entry_levels=1 max_rounds=2 max_new_tokens=8 "
TINY += f"num_epochs={EPOCHS} samples_per_epoch=4 batch_size=4 mini_batch_size=4 eval_samples=2"


def whole(run: Path) -> set[str]:
    """The epochs of a run whose checkpoints are there, every byte of them."""
    found = set()
    for folder in run.glob("epoch_*"):
        try:
            verify_checkpoint(folder)
            found.add(folder.name)
        except Damaged as error:
            print(f"{folder.name}: {error}")
    return found


def trainer_kills(times: int) -> None:
    """Kills runs so many times, from their folder's first moment on; each goes on to its end in the end."""
    rng, hits, failures = random.Random(0), 0, []
    while hits < times:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            run, finished, status = place / "run", set(), None
            for name in ("tmp", "home"):
                (place / name).mkdir()
            # The entries are tried once; what a run leaves in the folders for temporary files is to be seen.
            cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
            environment = os.environ | {"TMPDIR": f"{place}/tmp", "HOME": f"{place}/home", "XDG_CACHE_HOME": cache}
            while status != 0:
                going_on = ["resume_from=latest"] if any(run.glob("*_*/state.json")) else []
                command = [sys.executable, "train.py", *TINY.split(), f"output_dir={run}", *going_on]
                with (place / "said").open("w") as said:
                    process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=environment)
                while process.poll() is None and not run.exists():  # on a run that has not begun no kill is counted
                    time.sleep(0.1)
                try:
                    status = process.wait(rng.uniform(0, 40) if hits < times else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    hits += 1
                    time.sleep(2)
                    found = left_behind(process.pid)
                    print(f"kill {hits}: {sorted(finished)}; {found or 'nothing left'}", flush=True)
                    failures += found
                else:
                    if status:
                        raise SystemExit((place / "said").read_text())
                there = whole(run)
                failures += [f"{name} is lost" for name in sorted(finished - there)]
                finished |= there
            failures += [f"{name} is missing" for name in {f"epoch_{i + 1}" for i in range(EPOCHS)} - finished]
            left = [*run.glob(".*_*"), *place.glob("tmp/lora_ppo*"), *place.glob("home/lora_ppo*")]  # not libraries'
            failures += [f"{path.relative_to(place)} is left" for path in left]
    print(f"{hits} kills of a trainer, {len(failures)} failures", *failures, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["cost", "server", "kill", "kill-trainer"])
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--times", type=int, default=20)
    words = parser.parse_args()
    what = {"cost": cost, "server": lambda: through_server(words.at_once), "kill": lambda: kills(words.times)}
    (what | {"kill-trainer": lambda: trainer_kills(words.times)})[words.what]()


if __name__ == "__main__":
    main()
