"""Plays episodes on a server (server.py). One that dies costs the episodes in flight, which are unknown then."""

import contextlib
import sys
import threading
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
LONGEST = 150_000  # characters of a reply that are read: what no action can need


def token_file(port: int, name: str = "") -> Path:
    """Where the server on a port writes its token, and the client reads it."""
    return Path(name).expanduser() if name else cache_folder() / "os_interaction" / f"token_{port}"


@dataclass(frozen=True)
class RemoteEntry:
    """What the server tells of an entry: not its check, only a fingerprint of all its scripts."""

    name: str
    instruction: str
    skills: tuple[str, ...]
    level: str
    key: str = ""


class Unreachable(RuntimeError):
    """The server is gone, or does not know the episode any more."""


class Refused(Unreachable):
    """The server answers, and not what was asked for: to ask again would not help."""


class Full(Unreachable):
    """The server has no room for another episode."""


class Server:
    """A connection to the server at a URL. Raises ConfigError where none answers, or the token is missing."""

    def __init__(self, url: str, token: str = "", command_seconds: float = 0):
        try:
            import httpx
        except ImportError:
            raise ConfigError("server=URL needs a package: pip install httpx") from None
        self.url, self.httpx = url.rstrip("/"), httpx
        try:
            parts = urlsplit(self.url)
            port = parts.port or 80
        except ValueError:
            parts = None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"server={url} is no URL: expected http://127.0.0.1:8000")
        self.token_path = token_file(port, token)
        self.lock, self.told = threading.Lock(), set()
        # What the server plays by and with; its token, which every start of a server makes anew.
        self.settings: dict[str, Any] = {}
        self.entries: list[RemoteEntry] | None = None
        self.token = ""
        # A command's time, a full machine's on top; no proxy stands between a machine and itself.
        limits = httpx.Limits(max_connections=128, max_keepalive_connections=0)
        timeout = httpx.Timeout(command_seconds + 300, connect=5)
        self.http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, limits=limits)
        if not self.alive():
            raise ConfigError(f"server={url} does not answer: start it with python -m tasks.os_interaction.server")
        if not self.token_path.is_file():
            raise ConfigError(f"server={url}: its token is not in {self.token_path}: set server_token=FILE")

    def alive(self) -> bool:
        try:
            return self.http.post("/api/ping", json={}, timeout=5).status_code == 200
        except (self.httpx.HTTPError, self.httpx.InvalidURL):
            return False

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, **options: Any) -> Any:
        """A request's answer. Raises Unreachable."""
        try:
            headers = {"Authorization": f"Bearer {self.token_path.read_text()}"}
            answer = self.http.request(method, path, json=body, headers=headers, **options)
        except (OSError, UnicodeError, self.httpx.HTTPError) as error:
            raise Unreachable(f"the server is gone ({type(error).__name__})") from None
        if answer.status_code != 200:
            try:
                detail = answer.json()["detail"]
            except (ValueError, KeyError, TypeError):
                detail = answer.text[:200]
            kind = Full if answer.status_code == FULL else Refused
            raise kind(f"the server says {answer.status_code}: {detail}")
        return answer.json()

    def agree(self, settings: dict[str, Any], at_once: int = 1) -> None:
        """Raises ConfigError where the server plays by other settings than these, or not so many episodes at once."""
        self.settings = settings
        try:
            told = self.rules()
        except Unreachable as error:
            raise ConfigError(f"server={self.url}: {error}") from None
        if at_once > told["most_sessions"]:
            raise ConfigError(
                f"server={self.url} plays {told['most_sessions']} episodes at once (its most_sessions), and a batch "
                f"has {at_once}: raise most_sessions there, or set a smaller batch here"
            )

    def rules(self) -> dict[str, Any]:
        """What the server plays by. Raises ConfigError where that is not what was agreed on, and Unreachable."""
        told = self.ask("GET", "/api/rules")
        differing = [
            f"{name}={told.get(name)} (here {value})"
            for name, value in self.settings.items()
            if told.get(name) != value
        ]
        if differing:
            raise ConfigError(
                clean(f"server={self.url} plays with {', '.join(differing)}: set them alike on both sides")
            )
        return told

    def samples(self) -> list[RemoteEntry]:
        """The server's entries. Raises ConfigError."""
        try:
            self.entries = self.told_entries()
        except Unreachable as error:
            raise ConfigError(f"server={self.url}: {error}") from None
        return self.entries

    def told_entries(self) -> list[RemoteEntry]:
        rows = self.ask("GET", "/api/samples")
        return [RemoteEntry(**row | {"skills": tuple(row["skills"])}) for row in rows]

    def recognize(self) -> None:
        """Compares a server that was started anew with the one before. Raises ConfigError and Unreachable."""
        with self.lock:
            try:
                token = self.token_path.read_text()
            except (OSError, UnicodeError) as error:
                raise Unreachable(f"the server is gone ({type(error).__name__})") from None
            if token != self.token:
                self.rules()
                if self.entries is not None and self.told_entries() != self.entries:
                    raise ConfigError(f"server={self.url} is back with other entries: start it with those of before")
                self.token = token
                self.told.clear()

    def wait(self, abandoned: threading.Event) -> None:
        """Waits until the server answers, and says so, or until the episode that waits is abandoned."""
        with self.lock:  # one waits for all
            if abandoned.is_set() or (self.alive() and self.token_path.is_file()):
                return
            print(f"server={self.url} is gone: waiting until it is back", file=sys.stderr, flush=True)
            while not self.alive() or not self.token_path.is_file():
                if abandoned.wait(WAIT):
                    return
            print(f"server={self.url} is back", file=sys.stderr, flush=True)

    def tell_once(self, text: str) -> None:
        """Says something of this server, once while it stays up."""
        with self.lock:
            if text not in self.told:
                print(clean(f"server={self.url}: {text}"), file=sys.stderr, flush=True)
            self.told.add(text)

    def episode(self, entry: RemoteEntry) -> "RemoteEpisode":
        return RemoteEpisode(self, entry)


class RemoteEpisode:
    """An episode that the server plays."""

    def __init__(self, server: Server, entry: RemoteEntry):
        self.server, self.entry, self.session, self.lost = server, entry, "", ""
        self.abandoned = threading.Event()  # set where nobody waits for it any more

    def reset(self) -> list[Message]:
        """Begins it; waits for a server that is gone, or full. Raises Unreachable if it is abandoned meanwhile."""
        self.close()
        self.lost = ""
        while not self.abandoned.is_set():
            try:
                self.server.recognize()
                begun = self.server.ask("POST", "/api/reset", {"name": self.entry.name})
            except Full as error:
                self.server.tell_once(f"{error}; waiting")
                self.abandoned.wait(WAIT)
            except Refused as error:
                raise ConfigError(f"server={self.server.url}: {clean(str(error))}") from None
            except Unreachable:
                self.abandoned.wait(WAIT)
                self.server.wait(self.abandoned)
            else:
                self.session = begun["session"]
                return begun["messages"]
        raise Unreachable("nobody waits for the episode any more")

    def step(self, reply: str) -> str | None:
        try:
            body = {"session": self.session, "reply": reply[:LONGEST]}
            return self.server.ask("POST", "/api/step", body)["message"]
        except Unreachable as error:
            self.lose(error)
            return None

    def outcome(self) -> Outcome:
        if not self.lost:
            try:
                told = self.server.ask("POST", "/api/outcome", {"session": self.session})
                self.session = ""  # the server has ended it
                return Outcome(**told)
            except Unreachable as error:
                self.lose(error)
        details = {"reason": "unknown", "rounds": 0, "skills": list(self.entry.skills)}
        return Outcome("unknown", 0.0, self.lost, details | ({"level": self.entry.level} if self.entry.level else {}))

    def lose(self, error: Unreachable) -> None:
        """Notes why it is unknown; a server that is up and does not know it any more is told of."""
        self.lost = str(error)
        if isinstance(error, Refused):
            self.server.tell_once(f"an episode is lost, {error}")

    def close(self) -> None:
        """Ends one that was not judged: the server has room for another."""
        if self.session:
            session, self.session = self.session, ""
            with contextlib.suppress(Unreachable):  # then it has ended, or the server ends it in a while
                self.server.ask("POST", "/api/close", {"session": session}, timeout=5)

    def __del__(self):
        with contextlib.suppress(Exception):  # at the program's end there may be no modules left
            self.close()
