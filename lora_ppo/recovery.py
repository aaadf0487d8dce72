"""What of a run is on disk, and how it comes back: after a kill, a crash, or damage to any of its parts."""

import json
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ppo.checkpoint import Damaged, checkpoints, identity, load_checkpoint, read_state
from lora_ppo.disk import Disk, users_folder
from lora_ppo.files import free_name
from lora_ppo.journal import Chain, Journal, LineFile, told
from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError, Settings
from lora_ppo.turns import STEP_SETTINGS, Turns, UndoneLater, Unrepeatable


class Recovery(Turns):
    """The turns of a run with its folder, journal and log. `recover` gives back what they hold.

    Checkpoint and journal know which run they are of: what was put in from elsewhere is named and not used. `notice` is
    told what a person should know.
    """

    def __init__(self, policy: Policy, config: Settings, notice: Callable[[str], None]):
        super().__init__(policy, config)
        self.notice = notice
        self.log = LineFile(users_folder(config.log_dir, config.user) / "run.log")
        self.id = secrets.token_hex(8)
        self.lines: list[dict[str, Any]] = []  # the log's, of this run's turns, without those undone
        self.unlogged: list[dict[str, Any]] = []  # what a crash, or a full disk, may have kept from the log
        self.saved_step = -1
        self.safe_step = 0  # the last step that a restart gives back
        self.unsafe = False  # whether something was learned that a restart would not give back
        self.anchored = False  # whether the journal can be replayed: it begins with a checkpoint, or a fresh policy
        self.faults: dict[int, str] = {}  # of the journal, by line
        self.disk = Disk(users_folder(config.checkpoint_dir, config.user), notice)
        self.surviving, self.close = self.disk.surviving, self.disk.close
        self.journal = Journal(self.folder / "journal.jsonl")
        self.settle()

    @property
    def folder(self) -> Path:
        return self.disk.folder

    def settle(self) -> None:
        """Notes that the weights contain the journal up to here, unless turns are waiting for their step."""
        if not self.pending:
            self.covered = {"turn": self.turn, "journal": {"run": self.id, "sha256": self.journal.head}}
            self.covered |= {"simulation": dict(self.simulation)} if self.simulation else {}
        if self.anchored and not self.journal.unwritten:
            self.safe_step, self.unsafe = self.policy.step, False

    def origin(self) -> dict[str, Any]:
        """What a fresh policy follows from. The weights tell a base model better than its name, which has spellings."""
        own = identity(self.policy) | {"seed": self.config.seed}
        return own | {"base_model": ""} if own["base_fingerprint"] else own

    def recover(self) -> bool:
        """Loads the newest whole checkpoint, and replays the turns after it; whether the journal can go on as it is."""
        with self.surviving("clear up after a crash"):
            self.disk.clear_up()
        try:
            chain = Chain(self.journal.lines())
        except OSError as error:
            raise ConfigError(f"{self.journal.path} can't be read ({error.strerror}): make it readable") from None
        states = {folder: read_state(folder) for folder in checkpoints(self.folder)}
        chain = self.find_out_which_run(chain, states)
        place = self.load_newest(chain, states)
        self.anchored = True
        if place is None:
            gone = "does not reach" if chain.entries else "is gone. Going on from"
            self.notice(
                f"{self.journal.path} {gone} step {self.policy.step}"
                f"{': going on from there' * bool(chain.entries)}. Turns after it, if there were any, are lost."
            )
        self.name_faults(chain)
        self.recollect(chain)
        return place is not None and self.id in chain.runs

    def find_out_which_run(self, chain: Chain, states: dict[Path, dict[str, Any]]) -> Chain:
        """Sets `id`, and marks checkpoints of other runs; a journal of another run is put aside. Returns this run's."""
        of = {folder: state["journal"]["run"] for folder, state in states.items() if "journal" in state}
        of |= {folder: "" for folder, state in states.items() if state and "turn" not in state}  # of train.py
        named = [run for run in chain.runs if run in of.values()]
        found = named or list(dict.fromkeys(run for run in of.values() if run))
        if len(found) > 1 and not named:
            one, other = (next(folder for folder in of if of[folder] == run) for run in found[:2])
            raise ConfigError(
                f"{one} and {other.name} are of two runs, and no journal tells which is here: move one of them away"
            )
        self.id = (found or chain.runs or [self.id])[0]
        born = chain.after.get("")  # a run whose journal has hashes from its first line on has them in its checkpoints
        hashed = born is not None and born.sealed and born.record.get("run") == self.id
        for folder in states:
            if of.get(folder, None if hashed else self.id) != self.id:
                self.disk.foreign.add(folder)
                self.notice(f"{folder.name} is of another run: it is left alone.")
        mine = [state for folder, state in states.items() if state and folder not in self.disk.foreign]
        if chain.runs and self.id not in chain.runs and not any(chain.place(state) for state in mine):
            aside = free_name(self.folder / "journal_of_another_run.jsonl")
            with self.surviving("put another run's journal aside"):
                self.journal.path.rename(aside)
            self.notice(f"{self.journal.path} is of another run: it is kept as {aside.name}.")
            return Chain([])
        return chain

    def load_newest(self, chain: Chain, states: dict[Path, dict[str, Any]]) -> str | None:
        """Loads and replays; returns the hash of the last line in the checkpoint, None where the journal lacks it.

        Where no checkpoint serves, the whole journal does, from the fresh policy that it began with. A step in the
        newest checkpoint may have been undone later: then an earlier one serves.
        """
        fresh, reasons = self.policy.snapshot(), []
        for undone_too in (False, True):
            for folder in states:
                if folder in self.disk.foreign | self.disk.damaged:
                    continue
                try:
                    state = load_checkpoint(folder, self.policy, self.notice)
                    if folder.name != f"step_{state['step']}":
                        raise Damaged(f"it is step_{state['step']} under another name")
                    self.go_on_from(chain, chain.place(state), state, undone_too)
                    self.disk.kept["resumed"], self.saved_step = folder, state["step"]
                    return chain.place(state)
                except (Damaged, UndoneLater) as error:
                    if isinstance(error, Damaged):
                        self.disk.damaged.add(folder)
                    reasons.append(f"{folder.name}: {error}")
                    self.notice(f"{folder.name} can't be used ({error}); trying the one before it.")
            begin = chain.after.get("")
            if begin and begin.record.get("from") == self.origin() and begin.record.get("run") == self.id:
                self.policy.restore(fresh)
                self.notice("No checkpoint is left: taking the run's turns again from its beginning.")
                self.go_on_from(chain, "", {"turn": 0}, undone_too)
                return ""
        raise ConfigError(
            f"{self.folder} holds no whole checkpoint ({'; '.join(reasons) or 'none at all'}): "
            "set resume=none for a new run beside it"
        )

    def go_on_from(self, chain: Chain, place: str | None, state: dict[str, Any], undone_too: bool) -> None:
        """Replays what follows `place` in the journal on a checkpoint that is loaded. Raises UndoneLater.

        With `undone_too` a step that was undone later stays, if it is in the checkpoint.
        """
        self.turn, self.simulation = state["turn"], state.get("simulation")
        then = {name: value for name, value in state.get("config", {}).items() if name in STEP_SETTINGS}
        self.policy.configure(replace(self.config, **then))
        self.pending.clear()
        self.undo_snapshot = None
        entries = [] if place is None else list(chain.follow(place))
        turns = sum(entry.record.get("type") == "turn" for entry in entries)
        if turns:
            self.notice(f"Replaying {turns} turn{'s' * (turns > 1)} from the journal.")
        # Lines that come after a place which the journal lacks say so by the hash of a line that is nowhere.
        lost = state.get("journal", {}).get("sha256") or secrets.token_hex(32)
        self.journal.head = lost if place is None else place
        self.settle()
        self.unlogged = state.get("unlogged", [])
        try:
            for entry in self.replay(entries, early="journal" not in state):
                self.journal.head = entry.sha256
                self.unlogged += [entry.record["log"]] if "log" in entry.record else []
                self.settle()
        except Unrepeatable as error:
            if isinstance(error, UndoneLater) and not undone_too:
                raise
            self.notice(f"{self.journal.path}: {error}. Going on from the line before it.")

    def name_faults(self, chain: Chain) -> None:
        """Tells what is wrong with the journal, line by line; what earlier starts have told, the journal says."""
        self.faults = chain.faults(self.id, self.journal.head, self.turn)
        told_before: set[int] = set()
        for entry in chain.before(self.journal.head):
            told_before |= set(entry.record.get("faults", ()))
        if new := {number: what for number, what in self.faults.items() if number not in told_before}:
            self.notice(f"{self.journal.path}: {told(new)}. What does not fit is not used, and stays in the file.")

    def recollect(self, chain: Chain) -> None:
        """The run's history from the journal, and before a journal that was lost from the log; completes the log."""
        with self.surviving("read and complete the log"):
            logged, damaged = self.log.read()
            if damaged:
                self.notice(f"{self.log.path}: {told(dict.fromkeys(damaged, 'is damaged'))}. It is left as it is.")
            entries = chain.before(self.journal.head)
            first = self.turn
            if entries:
                first = entries[0].record.get("turn", 0) if entries[0].prev else 0
            for line in logged if first else []:
                if line.get("turn", first) < first and self.lines and line["turn"] <= self.lines[-1]["turn"]:
                    self.lines.clear()  # a new run began
                self.remember(line)
            self.lines = [line for line in self.lines if line["turn"] < first]
            for entry in entries:
                self.remember(entry.record.get("log", {}))
            there = Counter(map(json.dumps, logged))
            for line in map(json.dumps, self.unlogged):
                if there[line]:
                    there[line] -= 1
                else:
                    self.log.add(json.loads(line))
            self.log.flush()

    def remember(self, line: dict[str, Any]) -> None:
        """Adds a line of the log to the run's history."""
        if line.get("undo"):
            del self.lines[-line["undo"] :]
        elif {"turn", "reward"} <= line.keys():
            self.lines.append(line)
