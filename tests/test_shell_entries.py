"""Entries: forms they are read in, and that every one shipped here holds in the sandbox."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.shell import SMALL

from lora_ppo.settings import ConfigError
from tasks.os_interaction import split, supported
from tasks.os_interaction.commands import SandboxFailed
from tasks.os_interaction.entries import OWN, Entry, read_entries
from tasks.os_interaction.episode import Rules, ShellEpisode, bash_reply
from tasks.os_interaction.plain import Nothing
from tasks.os_interaction.sandbox import Namespaces
from tasks.os_interaction.support import left_out, why_not

ROOT = Path(__file__).resolve().parent.parent
LIFELONG = Path(os.environ.get("OS_INTERACTION", ROOT.parent / "shared" / "data" / "os_interaction"))
needs_lifelong = pytest.mark.skipif(not LIFELONG.is_dir(), reason="LifelongAgentBench's entries are not here")


def row(start="true", check="test -f /x", truth="touch /x", **more) -> dict:
    return {
        "instruction": "Create /x.",
        "initialization_command_item": {"command_name": "bash", "script": start},
        "evaluation_info": {
            "evaluation_command_item": {"command_name": "bash", "script": check},
            "ground_truth_command_item": {"command_name": "bash", "script": truth},
        },
        "skill_list": ["touch"],
    } | more


def as_text(entry: dict) -> dict:
    """An entry whose fields arrived as Python literals, as in the parquet files."""
    return {k: v if isinstance(v, str) else repr(v) for k, v in entry.items()}


@pytest.mark.parametrize("form", ["mapping", "list", "text", "parquet"])
def test_all_forms_of_an_entry_give_the_same(tmp_path, form):
    rows = [row(level="2"), row(truth="echo '[1]' >/x", check="[ -s /x ]", level="3")]
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([as_text(one) for one in rows]), tmp_path / "a.parquet")
    else:
        content = {"mapping": dict(zip("01", rows, strict=True)), "list": rows, "text": [as_text(r) for r in rows]}[
            form
        ]
        (tmp_path / "a.json").write_text(json.dumps(content))
    entries = read_entries(tmp_path)
    assert [(e.name, e.instruction, e.start, e.check, e.truth, e.skills, e.level) for e in entries] == [
        ("0", "Create /x.", "true", "test -f /x", "touch /x", ("touch",), "2"),
        ("1", "Create /x.", "true", "[ -s /x ]", "echo '[1]' >/x", ("touch",), "3"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["a.json", "can't be read"]),
        ("3", ["found int", "a list or a mapping"]),
        ("[]", ["holds none"]),
        (json.dumps([{"instruction": " "}]), ["entry 0", "no instruction"]),
        (json.dumps([row() | {"evaluation_info": "nonsense"}]), ["entry 0", "evaluation_info", "found str"]),
        (json.dumps([row() | {"skill_list": None}]), ["skill_list", "found nothing"]),
        (json.dumps([row() | {"initialization_command_item": {"command_name": "sh", "script": ""}}]), ["'sh'", "bash"]),
        (json.dumps([row() | {"initialization_command_item": {"command_name": "bash"}}]), ["no script"]),
        (json.dumps([row() | {"skill_list": "{[1]: 2}"}]), ["skill_list", "found str"]),
        (json.dumps([row() | {"skill_list": [["a"], None]}]), ["skill_list", "[['a'], None]", "a list of texts"]),
        (json.dumps([row(start="echo \0")]), ["entry 0", "a zero byte in the script"]),
        (json.dumps([row(check="echo \ud800")]), ["entry 0", r"found '\ud800', half a character"]),
        (json.dumps([row(instruction="\udfff")]), ["entry 0", r"found '\udfff', half a character"]),
        (json.dumps([row(skill_list=["\ud801"])]), ["entry 0", r"found '\ud801', half a character"]),
        (json.dumps({"\ud802": row()}), [r"found '\ud802', half a character"]),
        ("[" * 200_000, ["a.json", "can't be read"]),
        (json.dumps([row(sample_index=4), row(sample_index=4)]), ["4 stands twice"]),
    ],
)
def test_an_entry_that_lacks_something_is_named(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_entries(tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


SUM = "cmp /tests/expected /app/sum.txt"


def harbor(folder: Path, dockerfile: str = "FROM ubuntu:24.04\nWORKDIR /app\n", test: str = "") -> Path:
    for name in ("tests", "solution", "environment"):
        (folder / name).mkdir(parents=True)
    (folder / "instruction.md").write_text("Write 4 to /app/sum.txt.\n")
    (folder / "task.toml").write_text('version = "1.0"\n[metadata]\ndifficulty = "hard"\ntags = ["sums"]\n')
    (folder / "environment" / "Dockerfile").write_text(dockerfile)
    (folder / "tests" / "expected").write_text("4\n")
    (folder / "tests" / "test.sh").write_text(
        test or f"cat; cd /logs/verifier\nif {SUM}; then echo 1; else echo 0; fi >reward.txt\n"
    )
    (folder / "solution" / "solve.sh").write_text("#!/bin/bash\necho 4 >/app/sum.txt\n")
    return folder


def test_a_task_folder_of_harbor_is_read_and_holds(tmp_path, sandboxes):
    harbor(tmp_path / "sum")
    (entry,) = read_entries(tmp_path)
    assert (entry.name, entry.level, entry.skills) == ("sum", "3", ("sums",))
    assert why_not(entry, lambda: Namespaces(SMALL)) == ""


PASSED = "mkdir -p /logs/verifier; echo 1 >/logs/verifier/reward.txt"
FAKE_TAR = f"printf '#!/bin/bash\\nmkdir -p /tests; echo \"{PASSED}\" >/tests/test.sh' >/usr/local/bin/tar; "


@pytest.mark.parametrize("test", ["", SUM])  # by a reward, or by the exit status alone
@pytest.mark.parametrize(
    ("commands", "verdict"),
    [
        ("echo 4 >/app/sum.txt", "correct"),
        (f"mkdir -p /tests; echo '{PASSED}' >/tests/test.sh", "incorrect"),
        (PASSED, "incorrect"),
        ("mkdir -p /logs/verifier; ln -s /dev/null /logs/verifier/reward.txt", "incorrect"),
        (FAKE_TAR + "chmod +x /usr/local/bin/tar", "incorrect"),
        ("ln -s /bin/false /usr/local/bin/tar; ln -s /bin/true /usr/local/bin/awk", "incorrect"),
        ("head -c 300M /dev/zero >/fill", "incorrect"),
        ("ln -s /dev/null /tests; ln -s /etc /logs", "incorrect"),
    ],
)
def test_an_episode_is_judged_by_harbors_tests_and_not_by_its_own(tmp_path, sandboxes, test, commands, verdict):
    (entry,) = read_entries(harbor(tmp_path / "sum", test=test))
    episode = ShellEpisode(entry, lambda: Namespaces(SMALL), Rules())
    episode.reset()
    episode.step(bash_reply(commands))
    assert episode.outcome().verdict == verdict, episode.outcome().why


def test_without_a_sandbox_no_file_is_laid_into_the_hosts_root(tmp_path):
    """A check would remove a folder first: here one of the test's own."""
    own = tmp_path / "tests"
    own.mkdir()
    for run in (Nothing().run, Nothing().check):
        with pytest.raises(SandboxFailed, match="no entry with files"):
            run(f"rm -rf {own}", stdin=b"no archive")
    assert own.is_dir()
    (entry,) = read_entries(harbor(tmp_path / "sum", ""))
    assert "no entry with files" in why_not(entry, Nothing)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("task.toml", b'environment = "x"', "environment: found str, expected a table"),
        ("task.toml", b"metadata = 3", "metadata: found int, expected a table"),
        ("task.toml", b'[metadata]\ntags = "abc"', "tags: found 'abc', expected a list of texts"),
        ("instruction.md", b"\xff", "can't be read: 'utf-8' codec"),
    ],
)
def test_a_task_folder_of_harbor_that_lacks_something_is_named(tmp_path, file, content, words):
    (harbor(tmp_path / "sum") / file).write_bytes(content)
    with pytest.raises(ConfigError, match="sum.*" + words):
        read_entries(tmp_path)


@pytest.mark.parametrize("dockerfile", ["FROM python:3.12\n", "FROM ubuntu:24.04\nRUN apt-get install -y gcc\n"])
def test_a_harbor_task_with_an_image_of_its_own_is_left_out_and_the_others_are_not(tmp_path, dockerfile):
    harbor(tmp_path / "tasks" / "own", dockerfile)
    harbor(tmp_path / "tasks" / "plain")
    told = []
    kept = supported(read_entries(tmp_path / "tasks"), lambda: Namespaces(SMALL), "test", told.append)
    assert [entry.name for entry in kept] == ["plain"]
    assert told == ["1 of 2 entries are supported", "left out: own: it needs an image of its own"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (row(), ""),
        (row(start="echo no; exit 3"), "the start script fails (exit status 3: no)"),
        (row(start="touch /x"), "the untouched start passes the check"),
        (row(truth="false"), "the truth does not pass the check; the truth itself ends with exit status 1"),
        (row(truth="touch /y"), "the truth does not pass the check"),
    ],
)
def test_entries_that_do_not_hold_are_left_out_with_the_reason(tmp_path, sandboxes, monkeypatch, entry, why):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    entries = read_entries(tmp_path / "a.json")

    def make():
        return Namespaces(SMALL)

    assert left_out(entries, make, "test") == ({"0": why} if why else {})

    def refuse():
        raise AssertionError("what was found is kept")

    assert left_out(entries, refuse, "test") == ({"0": why} if why else {})
    with pytest.raises(AssertionError):  # another check is another entry
        left_out([Entry("0", "", "true", "true", "true")], refuse, "test")
    with pytest.raises(AssertionError):  # what holds in one sandbox may not in another
        left_out(entries, refuse, "dockerimage")


def test_of_several_processes_one_tries_the_entries(tmp_path):
    """Two processes at the same time, each entry's start script leaves a line: two runs of it, not four."""
    (tmp_path / "e.json").write_text(json.dumps({"e": row(start=f"echo >>{tmp_path}/runs; sleep 0.5; rm -f x",
                                                          check="test -f x", truth="touch x")}))  # fmt: skip
    program = (
        "import sys; from tasks.os_interaction import TaskSettings, ready; "
        "ready(TaskSettings(entries=sys.argv[1], sandbox='none', i_understand=True))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "e.json")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert (tmp_path / "runs").read_text() == "\n" * 2
    assert "1 of 1 entries are supported" in said[0]
    assert said[1] == ""


def test_every_entry_shipped_here_holds(tmp_path, sandboxes, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = read_entries(OWN)
    assert left_out(entries, Namespaces, "namespaces") == {}
    assert len(entries) >= 120
    assert len({skill for entry in entries for skill in entry.skills}) >= 12
    assert {entry.level for entry in entries} == {"1", "2", "3"}
    assert len({entry.instruction for entry in entries}) == len(entries)


def test_the_check_program_counts_on_its_last_line(tmp_path, sandboxes):
    rows = {"good": row(), "bad": row(truth="true")}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.os_interaction.check", str(tmp_path / "a.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "left out: bad: the truth does not pass the check",
        "0 untouched starts pass",
        "1 of 2 entries are supported",
    ]


@needs_lifelong
def test_lifelongagentbench_is_read_the_same_from_both_of_its_files():
    entries = read_entries(LIFELONG)
    assert len(entries) == 500
    assert read_entries(LIFELONG / "train-00000-of-00001.parquet") == entries


@needs_lifelong
def test_some_of_lifelongagentbench_holds(tmp_path, sandboxes, monkeypatch):
    """A dozen that want users, groups, owners, /usr/local and /bin; check.py runs all 500."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = read_entries(LIFELONG)
    some = entries[::50] + [entry for entry in entries if "/usr/local" in entry.truth][:4]
    assert left_out(some, Namespaces, "namespaces") == {}


def test_splits_share_nothing_and_are_always_the_same():
    entries = read_entries(OWN)
    splits = split(entries, 0.3, ["1", "2", "3"])
    names = {name: [entry.name for entry in some] for name, some in splits.items()}
    assert not set(names["train"]) & set(names["test"])
    assert len(names["train"]) + len(names["test"]) == len(entries)
    assert {entry.level for entry in splits["test"]} == {"1", "2", "3"}
    again = split(entries[::-1], 0.3, ["1", "2", "3"])
    assert [entry.name for entry in again["test"]] == names["test"]
    one = {entry.name for entry in split(entries, 0.3, ["1"])["test"]}
    assert one == {entry.name for entry in splits["test"] if entry.level == "1"}  # whatever else takes part
    assert {entry.level for some in split(entries, 0.3, ["2"]).values() for entry in some} == {"2"}
    with pytest.raises(ConfigError, match="none to test on"):
        split(entries, 0.3, ["7"])
