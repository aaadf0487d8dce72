"""The journal: a chain of hashes. Damaged in every way known, and then no wrong turn is taken and no whole one lost."""

import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from support.session import SETTINGS, log_lines, same, scripted_run, turns, weights

import lora_ppo.journal
from lora_ppo.checkpoint import checkpoints, sha256
from lora_ppo.journal import Chain, Journal, LineFile, told
from tools.bench.durability import DAMAGES, a_copy, try_damage

JOURNAL = Path("checkpoints/journal.jsonl")
KEEP = {"save_every": 1, "keep_checkpoints": 30}


@pytest.fixture(scope="module")
def two_runs(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The checkpoint folders of two runs, eight steps each."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        scripted_run(tiny_folder("llama"), folder, 8, seed=seed)
    return folders[0] / "c", folders[1] / "c"


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_run_stands_where_its_whole_parts_lead(two_runs, llama, tmp_path, name, seed):
    rng = random.Random(f"{name}{seed}")
    fixed = {"model_name": str(llama), "device": "cpu", "dtype": "float32", "lora_r": 4, "lora_alpha": 8}
    settings = SETTINGS | fixed | {"kl_coef": 0.0, "top_p": 1.0}
    folder = a_copy(two_runs[0], tmp_path / "copy", rng)
    assert try_damage(folder, two_runs[1], two_runs[0], name, rng, settings) == []


def test_every_line_carries_the_hash_of_the_one_before_and_of_itself(play):
    play(turns(3))
    before = ""
    lines = JOURNAL.read_bytes().splitlines()
    for line in lines:
        record = json.loads(line)
        body = line[: line.rindex(b', "sha256"')] + b"}"  # everything in front of it
        assert record["prev"] == before
        assert record["sha256"] == hashlib.sha256(body).hexdigest()
        before = record["sha256"]
    numbers = [r["number"] for r in map(json.loads, lines) if r["type"] == "turn"]
    assert numbers == [0, 1, 2]
    state = json.loads(Path("checkpoints/step_3/state.json").read_text())
    start, last_turn = json.loads(lines[0]), json.loads(lines[-1])
    assert state["journal"] == {"run": start["run"], "sha256": last_turn["sha256"]}


def test_line_ends_of_windows_change_nothing(play):
    _, _, run = play(turns(7), **KEEP)
    wanted = weights(run)
    shutil.copytree("checkpoints", "copy")
    JOURNAL.write_bytes(JOURNAL.read_bytes().replace(b"\n", b"\r\n"))
    status, output, run = play([], **KEEP)
    assert (status, run.policy.step) == (0, 7)
    assert same(weights(run), wanted)
    assert "line" not in output.partition("model ")[0]
    _, _, run = play(turns(2, first=7), **KEEP)
    after = weights(run)
    shutil.rmtree("checkpoints")
    shutil.copytree("copy", "checkpoints")
    _, _, run = play(turns(2, first=7), **KEEP)
    assert same(after, weights(run))


@pytest.mark.parametrize("covered", [True, False])
def test_a_digit_of_a_token_that_changed_is_named_once(play, covered):
    _, _, run = play(turns(6), save_every=100)
    reference = {2: None, 6: weights(run)}
    _, _, other = play(turns(2), checkpoint_dir="other")
    reference[2] = weights(other)
    if not covered:
        shutil.rmtree("checkpoints/step_6")
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"number": 2,' in line)
    ids = json.loads(lines[number])["prompt_ids"]
    altered = json.dumps([ids[0] + 1, *ids[1:]]).encode()
    lines[number] = lines[number].replace(json.dumps(ids).encode(), altered)
    JOURNAL.write_bytes(b"".join(lines))
    status, output, run = play([])
    assert status == 0
    assert f"line {number + 1} is damaged" in output
    assert run.policy.step == (6 if covered else 2)
    assert same(weights(run), reference[run.policy.step])
    if not covered:
        assert f"lines {number + 2} to {number + 4} do not follow from what is whole" in output
    assert JOURNAL.read_bytes().startswith(b"".join(lines))  # nothing of it is gone
    _, output, again = play([])
    assert "damaged" not in output
    assert same(weights(again), weights(run))


def test_a_journal_that_is_gone_costs_no_checkpoint(play):
    _, _, run = play(turns(9), **KEEP)
    wanted = weights(run)
    JOURNAL.unlink()
    status, output, run = play([], **KEEP)
    assert (status, run.policy.step) == (0, 9)
    assert "is gone. Going on from step 9. Turns after it, if there were any, are lost." in output
    assert same(weights(run), wanted)
    assert [line["step"] for line in run.history()] == [*range(1, 10)]  # from the log
    status, output, run = play(turns(3, first=9), save_every=2, keep_checkpoints=5)
    assert run.policy.step == 12
    assert [p.name for p in checkpoints(Path("checkpoints"))] == ["step_12", "step_10", "step_9", "step_8", "step_7"]
    after = weights(run)
    shutil.rmtree("checkpoints/step_12")
    _, output, run = play([])
    assert "Replaying 2 turns" in output
    assert same(weights(run), after)
    assert [line["step"] for line in run.history()] == [*range(1, 13)]


def test_pruning_spares_what_was_written_last_and_what_was_resumed_from(play):
    play(turns(9), **KEEP)
    for n in (7, 8, 9):
        (Path("checkpoints") / f"step_{n}" / "manifest.json").unlink()
    JOURNAL.unlink()
    _, _, run = play(turns(1, first=6), save_every=1, keep_checkpoints=2)
    assert run.policy.step == 7  # from step 6
    assert {"step_6", "step_7"} <= {p.name for p in checkpoints(Path("checkpoints"))}
    _, _, again = play([])
    assert same(weights(again), weights(run))


def test_a_checkpoint_of_another_run_is_never_used_nor_lost(play):
    play(turns(4), checkpoint_dir="other", log_dir="other_log", seed=1, **KEEP)
    _, _, run = play(turns(3), **KEEP)
    wanted = weights(run)
    shutil.copytree("other/step_4", "checkpoints/step_4")
    before = sha256(Path("checkpoints/step_4/optimizer.safetensors"))
    _, output, run = play([], **KEEP)
    assert "step_4 is of another run: it is left alone." in output
    assert same(weights(run), wanted)
    _, _, run = play(turns(1, first=3), **KEEP)
    assert run.policy.step == 4
    assert sha256(Path("checkpoints/step_4_of_another_run/optimizer.safetensors")) == before
    _, _, again = play([], **KEEP)
    assert same(weights(again), weights(run))


def test_two_runs_checkpoints_and_no_journal_are_refused_by_name(play):
    play(turns(2), checkpoint_dir="other", log_dir="other_log", seed=1, **KEEP)
    play(turns(1), **KEEP)
    shutil.copytree("other/step_2", "checkpoints/step_2")
    JOURNAL.unlink()
    status, output, _ = play([])
    assert status == 2
    assert "step_2 and step_1 are of two runs" in output


def test_beside_another_run_s_journal_a_checkpoint_without_its_state_is_passed_over(play):
    play(turns(2), checkpoint_dir="other", log_dir="other_log", seed=1, **KEEP)
    play(turns(3), **KEEP)
    shutil.copy("other/journal.jsonl", JOURNAL)
    Path("checkpoints/step_3/state.json").write_text("{")
    status, output, run = play([])
    assert (status, run.policy.step) == (0, 2)
    assert "of another run" in output


def test_a_checkpoint_of_training_without_a_person_is_of_another_run(play):
    play(turns(2), **KEEP)
    shutil.copytree("checkpoints/step_1", "checkpoints/step_5")
    state = json.loads(Path("checkpoints/step_5/state.json").read_text())
    for name in ("turn", "journal"):
        del state[name]
    Path("checkpoints/step_5/state.json").write_text(json.dumps(state))
    status, output, run = play([])
    assert (status, run.policy.step) == (0, 2)
    assert "step_5 is of another run" in output


def test_without_any_checkpoint_the_whole_journal_serves(play):
    _, _, run = play(turns(4))
    wanted = weights(run)
    for folder in checkpoints(Path("checkpoints")):
        shutil.rmtree(folder)
    _, output, run = play([])
    assert "Replaying 4 turns" in output
    assert same(weights(run), wanted)
    for folder in checkpoints(Path("checkpoints")):
        shutil.rmtree(folder)
    status, output, _ = play([], seed=1)  # not what it began with
    assert status == 2
    assert "holds no whole checkpoint" in output


def test_an_undone_step_stays_where_no_earlier_checkpoint_is_left(play):
    play(turns(1))
    play(turns(1, first=1))
    for name in ("step_0", "step_1"):
        shutil.rmtree(Path("checkpoints") / name)
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    journal = Journal(JOURNAL)
    journal.head = json.loads(lines[-1])["sha256"]
    journal.append({"type": "undo"})
    JOURNAL.write_bytes(JOURNAL.read_bytes().replace(lines[0], b""))  # the beginning is lost, too
    status, output, run = play([])
    assert (status, run.policy.step) == (0, 2)
    assert "undoes a step that is in the checkpoint. Going on from the line before it." in output


# --------------------------------------------------------------------------------------------- journals of old versions


def make_old(folder: Path) -> None:
    """Turns a run into what version 1 wrote: lines without hashes, checkpoints that name a byte of the journal."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]
    ends, data = {}, b""
    for line in lines:
        plain = {k: v for k, v in line.items() if k not in ("prev", "sha256", "faults", "simulation")}
        if line["type"] != "start":
            data += json.dumps(plain).encode() + b"\n"
        ends[line["sha256"]] = len(data)
    (folder / "journal.jsonl").write_bytes(data)
    for checkpoint in checkpoints(folder):
        state = json.loads((checkpoint / "state.json").read_text())
        state["journal_offset"] = ends[state.pop("journal")["sha256"]]
        (checkpoint / "state.json").write_text(json.dumps(state, indent=1))
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        data_ = (checkpoint / "state.json").read_bytes()
        manifest["files"]["state.json"] = {"sha256": hashlib.sha256(data_).hexdigest(), "bytes": len(data_)}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_the_last_version_goes_on_and_is_sealed_from_then_on(play):
    play(turns(3))
    play(turns(1, first=3))
    _, _, run = play(turns(1, first=4))
    wanted = weights(run)
    make_old(Path("checkpoints"))
    shutil.rmtree("checkpoints/step_5")
    shutil.rmtree("checkpoints/step_4")
    old = JOURNAL.read_bytes()
    _, output, run = play([])
    assert "Replaying 2 turns" in output
    assert same(weights(run), wanted)
    new = JOURNAL.read_bytes()
    assert new.startswith(old)
    start = json.loads(new[len(old) :].splitlines()[0])
    assert start["type"] == "start"
    assert start["prev"] == Chain(old.splitlines()).entries[-1].sha256
    _, _, run = play(turns(2, first=5))
    wanted = weights(run)
    for name in ("step_7", "step_6", "step_5"):
        shutil.rmtree(f"checkpoints/{name}", ignore_errors=True)
    _, output, run = play([])
    assert "Replaying 4 turns" in output  # old lines and new ones
    assert same(weights(run), wanted)
    assert [line["step"] for line in run.history()] == [*range(1, 8)]


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        (lambda lines: lines.pop(3), 2),  # a turn is missing
        (lambda lines: lines.insert(3, lines[3]), 3),
        (lambda lines: lines.__setitem__(3, b"{}\n"), 2),
        (lambda lines: lines.__setitem__(3, b"\0" * 40 + b"\n"), 2),
        (lambda lines: lines.__setitem__(3, lines[3].replace(b'"prompt_ids": [', b'"prompt_ids": [99999, ')), 2),
    ],
)
def test_an_old_journal_has_no_hashes_but_its_turns_have_numbers(play, damage, step):
    _, _, reference = play(turns(step), checkpoint_dir="other")
    play(turns(5), save_every=100)
    make_old(Path("checkpoints"))
    shutil.rmtree("checkpoints/step_5")
    lines = JOURNAL.read_bytes().splitlines(keepends=True)  # settings, then the turns
    damage(lines)
    JOURNAL.write_bytes(b"".join(lines))
    status, output, run = play([], save_every=100)
    assert (status, run.policy.step) == (0, step)
    assert same(weights(run), weights(reference))
    assert "journal.jsonl: line" in output
    _, _, run = play(turns(1, first=step), save_every=100)
    after = weights(run)
    shutil.rmtree(f"checkpoints/step_{step + 1}")
    _, output, again = play([], save_every=100)
    assert same(weights(again), after)


def test_an_old_checkpoint_with_turns_that_wait_is_understood(play):
    _, _, run = play([*turns(3), "/save"], batch_size=2)
    make_old(Path("checkpoints"))
    state_file = Path("checkpoints/step_1/state.json")
    state = json.loads(state_file.read_text())
    assert state["turn"] == 2
    state["turn"] = 3  # as old versions counted
    state_file.write_text(json.dumps(state, indent=1))
    manifest = json.loads(Path("checkpoints/step_1/manifest.json").read_text())
    manifest["files"]["state.json"] = {"sha256": sha256(state_file), "bytes": state_file.stat().st_size}
    Path("checkpoints/step_1/manifest.json").write_text(json.dumps(manifest))
    _, _, run = play(turns(1, first=3), batch_size=2)
    _, _, whole = play(turns(4), batch_size=2, checkpoint_dir="whole")
    assert run.policy.step == whole.policy.step == 2
    assert same(weights(run), weights(whole))


# ------------------------------------------------------------------------------------------------------ lines and logs


def test_a_chain_is_followed_by_its_hashes_and_its_faults_are_named(tmp_path):
    journal = Journal(tmp_path / "journal")
    for number in range(6):
        journal.append({"type": "start", "run": "mine"} if number == 0 else {"type": "turn", "number": number - 1})
    lines = journal.lines()
    head = journal.head

    def faults(*changed):
        return Chain(changed).faults("mine", head, 5)

    assert faults(*lines) == {}
    assert [e.number for e in Chain(lines).follow("")] == [1, 2, 3, 4, 5, 6]
    swapped = [*lines[:3], lines[4], lines[3], lines[5]]
    assert faults(*swapped) == {4: "belongs behind line 5"}
    assert [e.number for e in Chain(swapped).follow("")] == [1, 2, 3, 5, 4, 6]
    assert faults(*lines[:3], lines[1], *lines[3:]) == {4: "repeats line 2"}
    plain = b'{"type": "turn", "number": 1}'
    assert faults(*lines[:3], plain, *lines[3:]) == {4: "is damaged"}
    assert faults(lines[0], b"\xff\0", *lines[2:]) == {2: "is damaged"}
    assert faults(*lines, lines[5][:-9]) == {7: "is half-written"}
    left = Journal(tmp_path / "left")  # turns that were taken from line 5 on in a copy, and copied back
    left.head = json.loads(lines[4])["sha256"]
    left.append({"type": "turn", "number": 4, "other": True})
    left.append({"type": "passed", "number": 3})
    two = [*lines, *left.lines()]
    assert Chain(two).faults("mine", head, 9) == dict.fromkeys((7, 8), "is not what the run went on with")
    blanks = [b"\t" + json.dumps(json.loads(line), separators=(",", " :")).encode() + b" " for line in lines]
    assert faults(*blanks) == {}
    assert faults(*blanks[:3], blanks[3].replace(b'"number" :2', b'"number" :3'), *blanks[4:]) == {4: "is damaged"}
    missing = Chain([*lines[:2], *lines[3:]])
    stop = [*missing.follow("")][-1].sha256
    assert missing.faults("mine", stop, 1) == dict.fromkeys((3, 4, 5), "does not follow from what is whole")
    foreign = Journal(tmp_path / "foreign")
    foreign.append({"type": "start", "run": "theirs"})
    foreign.append({"type": "turn", "number": 0})
    assert faults(*lines, *foreign.lines()) == dict.fromkeys((7, 8), "is of another run")
    assert told({3: "is damaged", 5: "is of another run", 6: "is of another run"}) == (
        "line 3 is damaged; lines 5 to 6 are of another run"
    )


def test_a_line_is_cut_off_only_if_no_whole_record_begins_it(tmp_path):
    file = LineFile(tmp_path / "log")
    file.append({"a": 1})
    whole = file.path.read_bytes()
    for tail in (b'{"a": 2', b"\0" * 4096, b"{"):
        file.path.write_bytes(whole + tail)
        assert file.read() == ([{"a": 1}], [])
        assert file.path.read_bytes() == whole
    file.path.write_bytes(whole + b'{"a": 2}')  # only its end is missing
    assert file.read() == ([{"a": 1}, {"a": 2}], [])
    file.append({"a": 3})
    assert file.read() == ([{"a": 1}, {"a": 2}, {"a": 3}], [])
    glued = b'{"a": 1}{"a": 2}'
    file.path.write_bytes(glued)
    assert file.read() == ([], [1])
    assert file.path.read_bytes() == glued


@pytest.mark.parametrize(("call", "number"), [(i, (errno.EIO, errno.ENOSPC)[i % 2]) for i in range(12)])
def test_an_fsync_that_fails_once_loses_nothing(play, monkeypatch, call, number):
    calls, real = [], os.fsync

    def fsync(descriptor):
        calls.append(1)
        if len(calls) == 1 + 3 * call:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(lora_ppo.journal.os, "fsync", fsync)
        status, output, run = play(turns(3), save_every=1)
    assert len(calls) > 3 * call
    assert status == 0
    assert "Could not" in output or "The disk is full: removed" in output
    wanted = weights(run)
    _, output, again = play([])
    assert same(weights(again), wanted)
    assert [line["step"] for line in log_lines()] == [1, 2, 3]
    assert "line" not in output.partition("model ")[0]


def test_a_damaged_log_is_named_and_costs_neither_history_nor_session(play):
    play(turns(3), save_every=100)
    shutil.rmtree("checkpoints/step_3")
    lines = Path("logs/run.log").read_bytes().splitlines(keepends=True)
    Path("logs/run.log").write_bytes(lines[0] + b"\xff\xfe\0\n[1]\n5\n" + b'{"turn": 3}\n' + lines[0])
    status, output, run = play(["/progress", *turns(1, first=3)])
    assert status == 0
    assert "lines 2 to 4 are damaged" in output
    assert "accuracy 33% of 3" in output
    assert [line["step"] for line in run.history()] == [1, 2, 3, 4]
    assert [json.loads(line).get("step") for line in Path("logs/run.log").read_bytes().splitlines()[4:]] == [
        None,
        1,
        2,
        3,
        4,
    ]


def test_a_journal_that_cannot_be_read_is_one_line(play):
    play(turns(1))
    JOURNAL.unlink()
    JOURNAL.mkdir()
    status, output, _ = play([])
    assert status == 2
    assert "journal.jsonl can't be read (Is a directory)" in output
