"""A run on disk: undo, resume, crashes, damaged and full disks."""

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.session import SETTINGS, log_lines, same, scripted_quiz, turns, weights
from support.tiny import save_tiny, tiny_config

import lora_ppo_demo as demo
from config import Config
from lora_ppo.checkpoint import checkpoints, verify_checkpoint
from lora_ppo.journal import Journal, LineFile
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.run import Run
from lora_ppo.settings import parse
from lora_ppo.terminal import Terminal


def test_undo_takes_a_step_back_exactly_and_says_so_in_the_log(play):
    _, _, run = play(turns(2))
    before = weights(run)
    _, output, run = play([*turns(1, first=2), "/undo", "/undo"])
    assert "Undid step 3; the tutor is back at step 2." in output
    assert "There is no step to undo: only the last one of this session can be, once." in output
    assert same(weights(run), before)
    assert log_lines()[-1] == {"timestamp": log_lines()[-1]["timestamp"], "step": 3, "undo": 1}
    assert [line["step"] for line in run.history()] == [1, 2]


def test_undo_keeps_settings_that_changed_since_the_step(play):
    play(turns(2), save_every=100, kl_coef=0.01)
    shutil.rmtree("checkpoints/step_2")
    _, output, run = play(["/undo"], save_every=100, kl_coef=0.5)
    assert "the tutor is back at step 1" in output
    assert run.policy.kl_coef == 0.5


def test_undo_keeps_a_price_that_was_set_since_the_step_where_it_is_steered(play):
    steered = {"save_every": 100, "adaptive_kl": True, "kl_horizon": 10}
    play(turns(2), kl_coef=0.3, **steered)
    shutil.rmtree("checkpoints/step_2")
    assert play(["/undo"], kl_coef=0.5, **steered)[2].policy.kl_coef == 0.5


def test_the_settings_in_force_are_on_disk_before_anything_is_saved(play):
    play(turns(1))
    play([], learning_rate=3e-3)
    assert parse(Config, ["--config", "checkpoints/effective_config.yaml"]).learning_rate == 3e-3


def test_an_undo_that_a_crash_kept_from_the_log_comes_back(play):
    play([*turns(2), "/undo"])
    lines = Path("logs/run.log").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["undo"] == 1
    Path("logs/run.log").write_text("".join(lines[:-1]))
    shutil.rmtree("checkpoints/step_1")
    play([])
    assert Path("logs/run.log").read_text() == "".join(lines)


def clock(*times: str):
    """A clock that shows these times, and the last one for ever."""
    left = list(times)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


NOON, BEFORE = "2026-01-01T12:00:00+00:00", "2025-12-31T23:00:00+00:00"


@pytest.mark.parametrize("times", [[NOON], [NOON, BEFORE], [NOON, NOON, BEFORE, NOON]])
@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_lines_of_the_log_come_back_whatever_the_clock_shows(play, monkeypatch, times, kept):
    """Several turns in the same microsecond, or a clock that was set back."""
    monkeypatch.setattr("lora_ppo.run.now", clock(*times))
    play([*turns(2), "/undo", *turns(1), "/undo", *turns(1, first=5)], save_every=100)
    lines = Path("logs/run.log").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    Path("logs/run.log").write_text("".join(lines[:kept]))
    for folder in checkpoints(Path("checkpoints"))[:-1]:
        shutil.rmtree(folder)
    _, _, run = play([], save_every=100)
    assert Path("logs/run.log").read_text() == "".join(lines)
    assert [line["turn"] for line in run.history()] == [0, 3]


def test_undo_of_a_step_that_a_checkpoint_holds_survives_a_restart(play):
    _, _, run = play(turns(2))
    before = weights(run)
    play([*turns(1, first=2), "/undo"])  # save_every=3: step_3 had been written
    assert not Path("checkpoints/step_3").exists()
    _, _, run = play([])
    assert run.policy.step == 2
    assert same(weights(run), before)


def append(path: Path, record: dict) -> None:
    """Adds a line to a journal as the program does."""
    journal = Journal(path)
    journal.head = journal.read()[0][-1]["sha256"]
    journal.append(record)


def test_a_crash_between_an_undo_and_its_checkpoint_loses_neither(play, monkeypatch):
    _, _, run = play(turns(2))
    before = weights(run)
    play(turns(1, first=2))
    append(Path("checkpoints/journal.jsonl"), {"type": "undo"})  # the last thing that reached the disk
    _, output, run = play([])
    assert "step_3 can't be used" in output
    assert run.policy.step == 2
    assert same(weights(run), before)


def test_a_resumed_run_equals_an_uninterrupted_one(play, tmp_path):
    _, _, whole = play(turns(7), checkpoint_dir="whole", log_dir="whole_log")
    for first, count in ((0, 2), (2, 1), (3, 4)):
        _, _, parts = play(turns(count, first))
    assert same(weights(whole), weights(parts))
    assert whole.policy.step == parts.policy.step == 7
    keys = ("step", "question", "answer", "reward", "loss", "kl", "grad_norm")
    whole_log = [json.loads(line) for line in Path("whole_log/run.log").read_text().splitlines()]
    assert [[line[k] for k in keys] for line in whole_log] == [[line[k] for k in keys] for line in log_lines()]


def test_settings_may_change_between_sessions_and_the_journal_still_replays(play):
    play(turns(2), save_every=100)
    shutil.copytree("checkpoints", "copy")
    _, _, run = play(turns(2, first=2), save_every=100)
    wanted = weights(run)
    shutil.rmtree("checkpoints")
    shutil.copytree("copy", "checkpoints")
    shutil.rmtree("checkpoints/step_2")  # as if killed before the last save
    _, output, run = play([], learning_rate=3e-3, save_every=100)
    assert "Replaying 2 turns from the journal." in output
    _, _, run = play(turns(2, first=2), save_every=100)
    assert same(weights(run), wanted)


def test_a_price_that_is_steered_goes_on_and_another_one_counts_from_where_it_is_set(play):
    """Whether from a checkpoint or from the journal behind it."""
    steered = {"adaptive_kl": True, "kl_horizon": 10, "save_every": 2}
    _, _, run = play(turns(3), kl_coef=0.2, **steered)
    moved = run.policy.kl_coef
    assert moved != 0.2
    assert play([], kl_coef=0.2, **steered)[2].policy.kl_coef == moved
    assert play([], kl_coef=0.7, **steered)[2].policy.kl_coef == 0.7
    _, _, run = play(turns(1), kl_coef=0.7, **steered)
    again = run.policy.kl_coef
    assert again not in (0.7, moved)
    assert play([], kl_coef=0.7, **steered)[2].policy.kl_coef == again
    assert play([], kl_coef=0.7, **steered | {"adaptive_kl": False})[2].policy.kl_coef == 0.7


def test_steps_behind_a_checkpoint_are_taken_again_under_the_settings_of_then(play):
    _, _, run = play(turns(5))  # save_every=3
    wanted = weights(run)
    shutil.rmtree("checkpoints/step_5")  # as if killed after five turns
    _, output, run = play([], learning_rate=1e-4, temperature=0.5, target_kl=1e-9, lora_dropout=0.5)
    assert "Replaying 2 turns from the journal." in output
    assert same(weights(run), wanted)
    assert run.policy.optimizer.param_groups[0]["lr"] == 1e-4
    assert {dropout.p for dropout in run.policy.dropouts} == {0.5}


def test_a_turn_without_a_choice_counts_in_every_session(play):
    lines = ["even", "s", *turns(1)]
    _, _, whole = play(lines, checkpoint_dir="whole", log_dir="whole_log")
    play(lines[:2])
    play([])
    _, _, parts = play(lines[2:])
    assert same(weights(whole), weights(parts))
    _, _, other = play(turns(1), checkpoint_dir="other", log_dir="other_log")
    assert not same(weights(whole), weights(other))  # the number of a turn does make a difference


def test_batches_of_turns_wait_for_their_step_across_a_restart(play):
    _, output, _ = play(turns(3), batch_size=2, checkpoint_dir="whole")
    assert "1 of 2 answers for the next step." in output
    _, _, whole = play(turns(1, first=3), batch_size=2, checkpoint_dir="whole")
    _, _, once = play(turns(4), batch_size=2)
    assert once.policy.step == whole.policy.step == 2
    assert same(weights(once), weights(whole))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(play):
    _, _, run = play(turns(6))
    wanted = weights(run)
    path = Path("checkpoints/step_6/optimizer.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _, output, run = play([])
    assert "step_6 can't be used (optimizer.safetensors is not what was written); trying the one before it." in output
    assert same(weights(run), wanted)  # step_3, and three turns of the journal


def test_no_whole_checkpoint_is_an_error_that_touches_nothing(play):
    play(turns(1))
    for folder in Path("checkpoints").glob("step_*"):
        (folder / "manifest.json").unlink()
    Path("checkpoints/journal.jsonl").write_text("{}\n")  # the whole one would give everything back
    before = sorted(str(p) for p in Path("checkpoints").rglob("*"))
    status, output, _ = play([])
    assert status == 2
    assert "manifest.json is missing" in output
    assert "resume=none" in output
    assert sorted(str(p) for p in Path("checkpoints").rglob("*")) == before


def test_a_half_written_last_line_is_dropped_and_said_so(play):
    _, _, run = play(turns(2))
    wanted = weights(run)
    with Path("checkpoints/journal.jsonl").open("a") as file:
        file.write('{"type": "turn", "number": 2, "prom')
    _, output, run = play([])
    assert "is half-written" in output
    assert same(weights(run), wanted)


def test_a_log_line_that_a_crash_swallowed_comes_back(play):
    play(turns(2), save_every=100)
    lines = Path("logs/run.log").read_text().splitlines(keepends=True)
    Path("logs/run.log").write_text("".join(lines[:-1]) + lines[-1][:20])
    shutil.rmtree("checkpoints/step_2")
    play([])
    assert Path("logs/run.log").read_text() == "".join(lines)


def test_a_new_run_leaves_the_old_one_alone(play):
    play(turns(3))
    before = {p: p.read_bytes() for p in Path("checkpoints").rglob("*") if p.is_file() and p.name != ".lock"}
    _, _, run = play(turns(1), resume="none")
    assert run.policy.step == 1
    assert run.folder == Path("checkpoints/run_2")
    assert {p: p.read_bytes() for p in before} == before
    assert [line["step"] for line in run.history()] == [1]
    _, _, run = play([])
    assert (run.folder, run.policy.step) == (Path("checkpoints/run_2"), 1)
    _, _, run = play([], resume="checkpoints/step_3")
    assert (run.folder, run.policy.step) == (Path("checkpoints/run_3"), 3)
    saved = load_file("checkpoints/step_3/value_head.safetensors")
    assert torch.equal(run.policy.value_head.weight, saved["weight"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_r": 8}, ("lora_r=4", "now it is 8")),
        ({"lora_alpha": 8}, ("lora_alpha=32", "now it is 8")),
        ({"target_modules": "q_proj"}, ("target_modules=", "now it is ['q_proj']")),
        ({"resume": "nowhere"}, ("resume=nowhere", "manifest.json is missing")),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(play, settings, words):
    play(turns(1))
    status, output, _ = play([], **settings)
    assert status == 2
    assert output.count("\n") == 1
    assert all(word in output for word in words)


def test_another_base_model_is_refused(play, llama, tmp_path):
    play(turns(1))
    other = save_tiny("llama", tmp_path / "other", seed=1)  # a mere copy is the same model
    status, output, _ = play([], model_name=other)
    assert status == 2
    assert f"model_name={llama}" in output
    assert f"now it is {other}" in output


def test_old_checkpoints_are_removed_oldest_first(play):
    play(turns(5), save_every=1, keep_checkpoints=2)
    assert [p.name for p in checkpoints(Path("checkpoints"))] == ["step_5", "step_4"]


def test_a_second_tutor_is_kept_out(play, tmp_path):
    import filelock

    Path("checkpoints").mkdir()
    with filelock.FileLock("checkpoints/.lock"):
        status, output, _ = play(turns(1))
    assert status == 2
    assert "another tutor is using checkpoints" in output


def test_a_full_disk_costs_a_message_not_the_session(play):
    resource = pytest.importorskip("resource", reason="sets a limit on the size of files, as a full disk does")
    _, _, run = play(turns(1))
    size = Path("logs/run.log").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        status, output, run = play([*turns(2, first=1), "/progress", "/save"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1  # something is lost, and whoever called the program is told
    assert "of 3, mean reward" in output  # what waits to be written counts
    assert output.rstrip().endswith("what was learned since step 1 is lost.")
    for task in ("write the journal", "write the log", "save a checkpoint"):
        assert f"Could not {task} (" in output
    assert run.policy.step == 3
    assert Path("logs/run.log").stat().st_size == size
    _, _, run = play([])
    assert run.policy.step == 1  # what could not be written is gone with the process, and nothing else is
    assert not list(Path("checkpoints").glob(".step_*"))


def test_a_folder_that_cannot_be_written_costs_a_message(play):
    Path("checkpoints").write_text("a file where the folder should be")
    status, output, run = play(turns(2))
    assert status == 1
    assert output.rstrip().endswith("what was learned since step 0 is lost.")
    assert "Could not open the checkpoint folder" in output
    assert "Could not write the journal" in output
    assert run.policy.step == 2


def test_what_the_disk_refused_is_written_when_it_recovers(tmp_path):
    file = LineFile(tmp_path / "missing" / "lines")
    (tmp_path / "missing").write_text("in the way")
    with pytest.raises(FileExistsError):
        file.append({"a": 1})
    (tmp_path / "missing").unlink()
    file.append({"b": 2})
    assert file.read()[0] == [{"a": 1}, {"b": 2}]


def test_saving_writes_what_the_disk_refused_before(play, monkeypatch):
    real, full = LineFile.flush, [True]

    def flush(file):
        if full:
            raise OSError("no space left")
        real(file)

    _, _, run = play(turns(1))
    monkeypatch.setattr(LineFile, "flush", flush)
    original = demo.command
    monkeypatch.setattr(demo, "command", lambda text, *rest: full.clear() or original(text, *rest))
    _, output, run = play([*turns(1, first=1), "/save"])
    assert "Could not write the journal (no space left)" in output
    assert "Saved checkpoints/step_2." in output
    wanted = weights(run)
    shutil.rmtree("checkpoints/step_2")
    _, _, run = play([])
    assert same(weights(run), wanted)


def test_the_effective_configuration_reads_back(play):
    play(turns(1), cliprange=0.13)
    from lora_ppo.settings import parse

    again = parse(Config, ["--config", "checkpoints/effective_config.yaml"])
    assert again.cliprange == 0.13
    assert again.learning_rate == 1e-2


def scripted_child(loaded: tuple[Policy, Config], folder: Path, count: int, pipe: int) -> None:
    """Plays the turns that the run has not had yet, and tells the pipe which ones were acknowledged."""
    demo.make_quiz = scripted_quiz
    policy, config = loaded
    config = replace(config, checkpoint_dir=str(folder / "checkpoints"), log_dir=str(folder / "logs"))
    run = Run(policy, config, lambda text: None)
    Terminal.say = lambda *_: None
    Terminal.write = lambda *_: None
    sys.stdin = io.StringIO("")
    terminal = Terminal(folder / "history")
    while run.turn < count:
        question, choice = turns(1, first=run.turn)
        terminal.ask = lambda prompt, remember=True, choice=choice: choice
        number = run.turn
        demo.take_turn(question, policy, run, terminal)
        os.write(pipe, b"%d\n" % number)
    run.save()
    run.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd with CUDA refuses to work in a forked process")
def test_sigkill_at_thirty_moments_loses_no_acknowledged_turn(llama, tmp_path):
    count, rng = 40, random.Random(4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads don't survive a fork
    loaded = load_policy(tiny_config(llama, **SETTINGS))  # once: each child has a fresh copy
    try:
        reference, killed = tmp_path / "reference", tmp_path / "killed"
        play_in_child(loaded, reference, count, None)
        kills, acknowledged = 0, set()
        while kills < 30:
            finished, seen = play_in_child(loaded, killed, count, rng.uniform(0.02, 0.6))
            acknowledged |= seen
            journal = LineFile(killed / "checkpoints" / "journal.jsonl")
            there = {record["number"] for record in journal.read()[0] if record["type"] == "turn"}
            assert acknowledged <= there
            for folder in checkpoints(killed / "checkpoints"):
                verify_checkpoint(folder)
            kills += not finished
            if finished:
                count += 10  # it was quicker than the killer: more turns to kill in
        play_in_child(loaded, killed, count, None)
        play_in_child(loaded, reference, count, None)
    finally:
        torch.set_num_threads(threads)
    a, b = (checkpoints(folder / "checkpoints")[0] for folder in (reference, killed))
    assert a.name == b.name == f"step_{count}"
    for name in ("adapter_model.safetensors", "value_head.safetensors", "optimizer.safetensors"):
        assert same(load_file(a / name), load_file(b / name)), name
    logs = [
        [json.loads(line) for line in (f / "logs" / "run.log").read_text().splitlines()] for f in (reference, killed)
    ]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def play_in_child(
    loaded: tuple[Policy, Config], folder: Path, count: int, seconds: float | None
) -> tuple[bool, set[int]]:
    """Runs `scripted_child` in a fork, killed after `seconds`; (whether it finished, the turns it acknowledged)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            scripted_child(loaded, folder, count, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        seen = {int(line) for line in pipe.read().split()}
    if seconds is None:
        assert status == 0
    return status == 0, seen
