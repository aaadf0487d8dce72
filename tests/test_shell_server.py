"""The server of shell tasks as a user meets it: a process of its own, HTTP, kills."""

import asyncio
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_shell_entries import row

from lora_ppo.settings import ConfigError, parse
from tasks.os_interaction.limits import cgroup_parents

httpx = pytest.importorskip("httpx", reason="the server's packages are not here: pip install -r requirements-dev.txt")
pytest.importorskip("uvicorn", reason="the server's packages are not here: pip install -r requirements-dev.txt")
from tasks.os_interaction import AtOnce, prepare  # noqa: E402
from tasks.os_interaction.client import RemoteEntry, Server  # noqa: E402
from tasks.os_interaction.server import ServerConfig, Sessions, serve, settings_from  # noqa: E402
from train import TrainConfig  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOUCH, FINISH = "Act: bash\n```bash\ntouch /x; echo done\n```", "Act: finish"


class Running:
    """A server process on a free port, its log, and what it answers."""

    def __init__(self, folder: Path, *words: str, port: int = 0):
        (folder / "entries.json").write_text(json.dumps({f"e{i}": row() for i in range(4)}))
        self.log = folder / "log"
        command = [
            sys.executable,
            "-m",
            "tasks.os_interaction.server",
            f"port={port}",
            f"entries={folder}/entries.json",
        ]
        with self.log.open("w") as log:
            env = os.environ | {"XDG_CACHE_HOME": str(folder)}
            self.process = subprocess.Popen([*command, *words], cwd=ROOT, stderr=log, env=env)
        until = time.monotonic() + 60
        while "serves" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        line = next(line for line in self.log.read_text().splitlines() if "serves" in line)
        self.url, self.token_file = line.split()[0], line.rpartition("token: ")[2]
        self.token = Path(self.token_file).read_text()

    def ask(self, path: str, body: dict | None = None, method: str = "POST", **headers: str):
        headers = {"Authorization": f"Bearer {self.token}"} | headers
        return httpx.request(method, self.url + path, json=body, headers=headers, trust_env=False, timeout=60)

    def left(self) -> list[Path]:
        """The cgroups of its sandboxes that are still there."""
        found = cgroup_parents().values()
        return [path for parent in found for path in parent.glob(f"lora_ppo-{self.process.pid}-*")]

    def emptied(self) -> None:
        """Waits until no sandbox of it is there."""
        until = time.monotonic() + 20
        while self.left():
            assert time.monotonic() < until, self.left()
            time.sleep(0.1)

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(20)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    from support.shell import why_no_sandbox

    if why := why_no_sandbox():
        pytest.skip(why)
    server = Running(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
    assert server.left() == []
    assert not Path(server.token_file).exists()


def test_ping_needs_no_token_and_no_content_type(running):
    done = subprocess.run(
        ["curl", "-s", "--noproxy", "*", "-X", "POST", "-d", "{}", f"{running.url}/api/ping"], capture_output=True
    )
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong", "Basic x"])
def test_all_else_needs_it(running, token):
    for method, path, body in (
        ("GET", "/api/samples", None),
        ("GET", "/api/rules", None),
        ("POST", "/api/reset", {"name": "e0"}),
        ("POST", "/api/step", {"session": "x", "reply": "y"}),
        ("POST", "/api/outcome", {"session": "x"}),
        ("POST", "/api/close", {"session": "x"}),
    ):
        answer = running.ask(path, body, method, Authorization=token)
        assert answer.status_code == 401
        assert running.token not in answer.text


def test_the_token_is_for_its_owner_alone(running):
    assert Path(running.token_file).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1:1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_are_not_served(running, headers, status):
    assert running.ask("/api/ping", {}, **headers).status_code == status


def test_a_body_that_is_too_large_is_refused(running):
    assert running.ask("/api/step", {"session": "x", "reply": "y" * 1_000_001}).status_code == 413
    assert running.ask("/api/step", {"session": "x", "reply": "y" * 200_000}).status_code == 422
    endless = (b"x" * 100_000 for _ in range(100))
    answer = httpx.post(f"{running.url}/api/ping", content=endless, trust_env=False)
    assert answer.status_code == 413


def test_an_episode_over_http(running):
    samples = running.ask("/api/samples", method="GET").json()
    assert [one["name"] for one in samples] == ["e0", "e1", "e2", "e3"]
    key = samples[0].pop("key")
    assert len(key) == 16
    assert samples[0] == {"name": "e0", "instruction": "Create /x.", "skills": ["touch"], "level": ""}
    begun = running.ask("/api/reset", {"name": "e1"}).json()
    assert begun["messages"][-1]["content"] == "Create /x."
    session = begun["session"]
    step = running.ask("/api/step", {"session": session, "reply": TOUCH}).json()
    assert step["message"] == "The output of the OS:\ndone"
    assert running.ask("/api/step", {"session": session, "reply": FINISH}).json()["message"] is None
    assert running.ask("/api/outcome", {"session": session}).json()["verdict"] == "correct"
    for path, body in (("/api/step", {"session": session, "reply": "x"}), ("/api/outcome", {"session": session})):
        assert running.ask(path, body).status_code == 404
    assert running.ask("/api/reset", {"name": "../etc"}).status_code == 404
    assert running.ask("/api/reset", {"nome": "e1"}).status_code == 422
    assert running.left() == []
    told = running.ask("/openapi.json", method="GET").json()
    assert told["paths"]["/api/reset"]["post"]["security"] == [{"HTTPBearer": []}]


def client(running: Running) -> Server:
    return Server(running.url, running.token_file)


def test_who_trains_must_agree_with_the_server(running, tmp_path):
    entries = running.token_file  # any other name
    config = TrainConfig(
        server=running.url, server_token=running.token_file, entries=f"{running.log.parent}/entries.json"
    )
    prepare(config)(None)
    for changes, told in (
        ({"max_rounds": 3, "judge": "finished"}, "plays with max_rounds=5 (here 3), judge=stands (here finished)"),
        ({"entries": entries}, f"plays with entries={config.entries} (here {entries})"),
        ({"entries_digest": "0123"}, "entries_digest=0123, and the 4 entries here have "),
        ({"batch_size": 65}, "plays 64 episodes at once (its most_sessions), and a batch has 65"),
        ({"server": running.url.removeprefix("http://")}, "is no URL: expected http://127.0.0.1:8000"),
    ):
        with pytest.raises(ConfigError) as error:
            prepare(replace(config, **changes))
        assert told in str(error.value)
        assert "\n" not in str(error.value)


def test_the_digest_is_of_the_entries_wherever_they_are_played(running, tmp_path, monkeypatch):
    there = TrainConfig(
        server=running.url, server_token=running.token_file, entries=f"{running.log.parent}/entries.json"
    )
    prepare(there)
    monkeypatch.setenv("XDG_CACHE_HOME", str(running.log.parent))
    here = replace(there, server="", entries_digest="")
    prepare(here)
    assert here.entries_digest == there.entries_digest != ""
    (tmp_path / "e.json").write_text(json.dumps({f"e{i}": row(level="2") for i in range(4)}))
    other = replace(there, server="", entries_digest="", entries=f"{tmp_path}/e.json")
    prepare(other)
    assert other.entries_digest != here.entries_digest
    entries = {f"e{i}": row(check="test -d /x", truth="mkdir /x") for i in range(4)}  # all else is as it was
    (tmp_path / "e.json").write_text(json.dumps(entries))
    changed = replace(other, entries_digest="")
    prepare(changed)
    assert changed.entries_digest != here.entries_digest


def test_the_server_takes_its_own_of_trainings_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("task: os_interaction\nmax_rounds: 4\nentry_levels: ['1']\n")
    words = ["--config", f"{tmp_path}/c.yaml", "port=7000", "--", "max_rounds=3", "--judge", "finished", "lora_r=4"]
    words += ["--i-understand", "--learning_rate", "1e-4", "entry_levels=2", "--output_length=9"]
    config = settings_from(words)
    assert (config.port, config.max_rounds, config.judge, config.output_length) == (7000, 3, "finished", 9)
    assert config.entry_levels == ServerConfig().entry_levels
    assert config.i_understand
    for words in (["--i-understand"], ["--i-understand", "seed=1"], ["--i_understand", "--seed", "1"]):
        assert parse(TrainConfig, words).i_understand
    assert not parse(TrainConfig, ["--i-understand", "false"]).i_understand
    with pytest.raises(ConfigError, match="entry_levels is a setting of training"):
        serve(settings_from(["entry_levels=2"]))
    with pytest.raises(ConfigError, match="session_seconds=99 is less than max_rounds=5 times command_seconds=20"):
        serve(settings_from(["session_seconds=99"]))


def test_a_session_that_does_not_end_well_does_not_end_the_reaper(capsys):
    """Of three idle ones the first and the last can't be closed."""

    def episode(name: str):
        def close():
            if name != "1":
                raise OSError(f"{name} is stuck")

        return SimpleNamespace(reset=list, close=close)

    async def reaped() -> None:
        sessions = Sessions(SimpleNamespace(most_sessions=3, idle_seconds=0.02, session_seconds=99), episode)
        for name in "012":
            await sessions.start(name)
        reaper = asyncio.create_task(sessions.reap())
        until = time.monotonic() + 20
        while sessions.open:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        await sessions.start("1")
        while sessions.open:
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert not reaper.done()
        reaper.cancel()

    asyncio.run(reaped())
    said = capsys.readouterr().err
    assert said.count("did not end well") == 2
    assert "0 is stuck" in said


def test_a_busy_session_ends_once_it_is_idle_and_keeps_no_other_waiting():
    """Session "slow" is being set up when its time is over; a request waits in its line."""
    go_on, events = threading.Event(), []

    def episode(name: str):
        def reset():
            if name == "slow":
                go_on.wait(20)
            events.append(f"{name} begun")
            return []

        return SimpleNamespace(reset=reset, close=lambda: events.append(f"{name} closed"))

    async def asked(sessions: Sessions, key: str) -> None:
        async with sessions.at(key):
            events.append("asked")

    async def played() -> None:
        sessions = Sessions(SimpleNamespace(most_sessions=2, idle_seconds=0.2, session_seconds=0.2), episode)
        slow = asyncio.create_task(sessions.start("slow"))
        await asyncio.sleep(0)
        (key,) = sessions.open
        asking = asyncio.create_task(asked(sessions, key))
        await sessions.start("quick")
        reaper, until = asyncio.create_task(sessions.reap()), time.monotonic() + 20
        while "quick closed" not in events and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert events == ["quick begun", "quick closed"]
        go_on.set()
        with pytest.raises(KeyError):
            await asking
        await slow
        await asyncio.gather(*sessions.ending)
        assert events[2:] == ["slow begun", "slow closed"]
        reaper.cancel()

    asyncio.run(played())


def test_sixteen_episodes_at_once_through_the_client(running):
    server = client(running)
    entries = server.samples()

    def one(number: int) -> str:
        episode = server.episode(entries[number % 4])
        episode.reset()
        said = episode.step(TOUCH if number % 2 else "Act: bash\n```bash\nls /x\n```")
        assert said.startswith("The output of the OS:")
        episode.step(FINISH)
        return episode.outcome().verdict

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(32))) == ["incorrect", "correct"] * 16


def test_no_episode_is_longer_than_session_seconds(tmp_path, sandboxes):
    """One that is asked for all the time, so that it is never idle."""
    running = Running(tmp_path, "session_seconds=2", "idle_seconds=4", "max_rounds=4", "command_seconds=0.5")
    try:
        session = running.ask("/api/reset", {"name": "e0"}).json()["session"]
        reply = "Act: bash\n```bash\ntrue\n```"
        began = time.monotonic()
        while running.ask("/api/step", {"session": session, "reply": reply}).status_code == 200:
            assert time.monotonic() - began < 20
            time.sleep(0.1)
        assert time.monotonic() - began > 1
        running.emptied()  # it is refused from when its end begins
    finally:
        running.stop()


def test_sessions_are_counted_and_idle_ones_end(tmp_path, sandboxes, capfd):
    running = Running(tmp_path, "most_sessions=2", "idle_seconds=2")
    try:
        server = client(running)
        idle = [server.episode(server.samples()[0]) for _ in range(2)]
        for episode in idle:
            episode.reset()
        time.sleep(4)
        assert idle[0].step(FINISH) is None
        assert [episode.outcome().verdict for episode in idle] == ["unknown", "unknown"]
        assert capfd.readouterr().err.count("an episode is lost, the server says 404") == 1  # said once
        first, second, third = (running.ask("/api/reset", {"name": "e0"}) for _ in range(3))
        assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
        running.emptied()
        assert running.ask("/api/step", {"session": first.json()["session"], "reply": FINISH}).status_code == 404
        assert running.ask("/api/reset", {"name": "e0"}).status_code == 200
    finally:
        running.stop()
    assert running.left() == []


def test_a_server_that_is_killed_costs_the_episodes_in_flight_and_leaves_nothing(
    tmp_path, sandboxes, capfd, monkeypatch
):
    monkeypatch.setattr("tasks.os_interaction.client.WAIT", 0.1)
    running = Running(tmp_path)
    server = client(running)
    entry = server.samples()[0]
    episode = server.episode(entry)
    episode.reset()
    assert episode.step(TOUCH)
    busy = server.episode(entry)
    busy.reset()
    with ThreadPoolExecutor(2) as pool:
        step = pool.submit(busy.step, "Act: bash\n```bash\nexec -a lora_ppo_busy sleep 15\n```")
        time.sleep(0.5)
        running.stop(signal.SIGKILL)
        assert step.result(10) is None
        assert episode.step(FINISH) is None
        assert [one.outcome().verdict for one in (episode, busy)] == ["unknown", "unknown"]
        assert "gone" in episode.outcome().why
        until = time.monotonic() + 10
        while running.left() or b"lora_ppo_busy" in subprocess.run(["ps", "ax"], capture_output=True).stdout:
            assert time.monotonic() < until
            time.sleep(0.1)
        # The next episode waits until the server is back.
        waiting = pool.submit(server.episode(entry).reset)
        time.sleep(0.5)
        assert not waiting.done()
        again = Running(tmp_path, port=int(running.url.rpartition(":")[2]))
        try:
            assert waiting.result(30)[-1]["content"] == "Create /x."
        finally:
            again.stop()
    said = capfd.readouterr().err
    assert said.count("waiting until it is back") == 1
    assert "is back\n" in said


def test_a_server_that_comes_back_is_compared_and_keeps_its_token(tmp_path, sandboxes):
    """The old one ends after its successor wrote a token of its own; the successor plays by other rules."""
    running = Running(tmp_path)
    server = client(running)
    server.agree({"max_rounds": 5})
    episode = server.episode(server.samples()[0])
    episode.reset()
    Path(running.token_file).write_text("its successor's")
    running.stop()
    assert Path(running.token_file).read_text() == "its successor's"
    again = Running(tmp_path, "max_rounds=2", port=int(running.url.rpartition(":")[2]))
    try:
        with pytest.raises(ConfigError, match=r"plays with max_rounds=2 \(here 5\)"):
            episode.reset()
        server.settings, server.entries = {}, server.entries[1:]
        with pytest.raises(ConfigError, match="is back with other entries"):
            episode.reset()
    finally:
        again.stop()


def test_a_full_server_is_told_of_once_and_has_room_once_an_episode_is_dropped(tmp_path, sandboxes, capfd, monkeypatch):
    monkeypatch.setattr("tasks.os_interaction.client.WAIT", 0.1)
    running = Running(tmp_path, "most_sessions=2")
    try:
        server = client(running)
        episodes = [server.episode(server.samples()[0]) for _ in range(4)]
        for episode in episodes[:2]:
            episode.reset()
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(episode.reset) for episode in episodes[2:]]
            time.sleep(1)
            assert not any(one.done() for one in waiting)
            del episode, episodes[:2]
            for one in waiting:
                assert one.result(20)[-1]["content"] == "Create /x."
    finally:
        running.stop()
    assert capfd.readouterr().err.count("2 episodes are going on (most_sessions)") == 1


def test_ctrl_c_ends_the_episodes_that_wait_for_a_server(tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "alive", lambda self: True)  # it was there at the start
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "token").write_text("t")
    server = Server(f"http://127.0.0.1:{port}", str(tmp_path / "token"), command_seconds=3600)
    assert server.http.timeout.read > 3600
    monkeypatch.undo()
    before = set(threading.enumerate())
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        AtOnce.resets([AtOnce(server.episode(RemoteEntry("e0", "", (), ""))) for _ in range(20)])
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


def test_a_connection_that_breaks_is_made_again_and_a_refusal_is_told(tmp_path, monkeypatch):
    """A server of its own: the first two resets break off, the third is answered, the fourth refused."""
    monkeypatch.setattr("tasks.os_interaction.client.WAIT", 0.1)
    begun = json.dumps({"session": "s", "messages": [{"role": "user", "content": "Create /x."}]})
    resets = iter([None, None, (200, begun), (404, '{"detail": "there is no entry"}')])

    class Breaking(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, "{}")

        def do_POST(self):
            self.answer(*(next(resets) or (0, "") if self.path == "/api/reset" else (200, "{}")))

        def answer(self, status: int, body: str) -> None:
            if status:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        (tmp_path / "token").write_text("t")
        server = Server(f"http://127.0.0.1:{serving.server_address[1]}", str(tmp_path / "token"))
        entry = RemoteEntry("e0", "Create /x.", (), "")
        assert server.episode(entry).reset()[-1]["content"] == "Create /x."
        with pytest.raises(ConfigError, match="404: there is no entry"):
            server.episode(entry).reset()
        serving.shutdown()


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="does not answer: start it with"):
        Server("http://127.0.0.1:9")
