"""Plays episodes on a server (server.py). One that dies costs the episodes in flight, which are unknown then."""

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_ppo.chat import Message
from lora_ppo.episodes import Outcome
from lora_ppo.files import cache_folder
from lora_ppo.settings import ConfigError
from lora_ppo.terminal import clean

FULL, WAIT = 429, 2.0  # what a server answers that has no room; seconds between two tries


def token_file(port: int, name: str = "") -> Path:
    """Where the server on a port writes its token, and the client reads it."""
    return Path(name).expanduser() if name else cache_folder() / "os_interaction" / f"token_{port}"


@dataclass(frozen=True)
class RemoteEntry:
    """What the server tells of an entry: not its check."""

    name: str
    instruction: str
    skills: tuple[str, ...]
    level: str


class Unreachable(RuntimeError):
    """The server is gone, or does not know the episode any more."""


class Refused(Unreachable):
    """The server answers, and not what was asked for: to ask again would not help."""


class Server:
    """A connection to the server at a URL. Raises ConfigError where none answers, or the token is missing."""

    def __init__(self, url: str, token: str = ""):
        try:
            import httpx
        except ImportError:
            raise ConfigError("server=URL needs a package: pip install httpx") from None
        self.url, self.httpx = url.rstrip("/"), httpx
        try:
            port = urlsplit(self.url).port or 80
        except ValueError:
            raise ConfigError(f"server={url} is no URL: expected http://127.0.0.1:8000") from None
        self.token_path = token_file(port, token)
        self.lock = threading.Lock()
        # A command's time, a full machine's on top; no proxy stands between a machine and itself.
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=0)
        self.http = httpx.Client(
            base_url=self.url, timeout=httpx.Timeout(300, connect=5), trust_env=False, limits=limits
        )
        if not self.alive():
            raise ConfigError(f"server={url} does not answer: start it with python -m tasks.os_interaction.server")
        if not self.token_path.is_file():
            raise ConfigError(f"server={url}: its token is not in {self.token_path}: set server_token=FILE")

    def alive(self) -> bool:
        try:
            return self.http.post("/api/ping", json={}, timeout=5).status_code == 200
        except (self.httpx.HTTPError, self.httpx.InvalidURL):
            return False

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A request's answer. Raises Unreachable."""
        try:
            headers = {"Authorization": f"Bearer {self.token_path.read_text()}"}
            answer = self.http.request(method, path, json=body, headers=headers)
        except (OSError, self.httpx.HTTPError) as error:
            raise Unreachable(f"the server is gone ({type(error).__name__})") from None
        if answer.status_code == FULL:
            raise OverflowError
        if answer.status_code != 200:
            try:
                detail = answer.json()["detail"]
            except (ValueError, KeyError, TypeError):
                detail = answer.text[:200]
            raise Refused(f"the server says {answer.status_code}: {detail}")
        return answer.json()

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises ConfigError where the server plays by other settings than these."""
        try:
            told = self.ask("GET", "/api/rules")
        except Unreachable as error:
            raise ConfigError(f"server={self.url}: {error}") from None
        differing = [
            f"{name}={told.get(name)} (here {value})" for name, value in settings.items() if told.get(name) != value
        ]
        if differing:
            raise ConfigError(
                clean(f"server={self.url} plays with {', '.join(differing)}: set them alike on both sides")
            )

    def samples(self) -> list[RemoteEntry]:
        """The server's entries. Raises ConfigError."""
        try:
            rows = self.ask("GET", "/api/samples")
        except Unreachable as error:
            raise ConfigError(f"server={self.url}: {error}") from None
        return [RemoteEntry(row["name"], row["instruction"], tuple(row["skills"]), row["level"]) for row in rows]

    def wait(self) -> None:
        """Waits until the server answers, and says so."""
        with self.lock:  # one waits for all
            if self.alive() and self.token_path.is_file():
                return
            print(f"server={self.url} is gone: waiting until it is back", file=sys.stderr, flush=True)
            while not self.alive() or not self.token_path.is_file():
                time.sleep(WAIT)
            print(f"server={self.url} is back", file=sys.stderr, flush=True)

    def episode(self, entry: RemoteEntry) -> "RemoteEpisode":
        return RemoteEpisode(self, entry)


class RemoteEpisode:
    """An episode that the server plays."""

    def __init__(self, server: Server, entry: RemoteEntry):
        self.server, self.entry, self.session, self.lost = server, entry, "", ""

    def reset(self) -> list[Message]:
        """Begins it; waits for a server that is gone, or full."""
        self.lost = ""
        while True:
            try:
                begun = self.server.ask("POST", "/api/reset", {"name": self.entry.name})
            except OverflowError:
                time.sleep(WAIT)
            except Refused as error:
                raise ConfigError(f"server={self.server.url}: {clean(str(error))}") from None
            except Unreachable:
                time.sleep(WAIT)
                self.server.wait()
            else:
                self.session = begun["session"]
                return begun["messages"]

    def step(self, reply: str) -> str | None:
        try:
            return self.server.ask("POST", "/api/step", {"session": self.session, "reply": reply})["message"]
        except Unreachable as error:
            self.lost = str(error)
            return None

    def outcome(self) -> Outcome:
        if not self.lost:
            try:
                return Outcome(**self.server.ask("POST", "/api/outcome", {"session": self.session}))
            except Unreachable as error:
                self.lost = str(error)
        details = {"reason": "unknown", "rounds": 0, "skills": list(self.entry.skills)}
        return Outcome("unknown", 0.0, self.lost, details | ({"level": self.entry.level} if self.entry.level else {}))
