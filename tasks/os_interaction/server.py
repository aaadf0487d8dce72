"""Serves episodes at the shell over HTTP, so that the program that trains need not be the one that runs commands.

    python -m tasks.os_interaction.server [port=8000] [entries=DIR] [name=value ...]

    curl -X POST -d '{}' http://127.0.0.1:8000/api/ping

`POST /api/reset`, `/api/step`, `/api/outcome`, `/api/close`, `GET /api/samples`, `/api/rules`: what they take and give
is at http://127.0.0.1:8000/docs. All but ping want the token that the server writes to a file at its start, as
`Authorization: Bearer TOKEN`.
It listens on 127.0.0.1 alone, and answers no other Host and no Origin but its own, so that no web page can talk to it.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_ppo.settings import ConfigError, Settings, help_text, parse, read_yaml, setting, split_arguments
from lora_ppo.streams import run_program
from lora_ppo.terminal import clean, program
from tasks.os_interaction import PLAYED_BY, TaskSettings, ready
from tasks.os_interaction.client import LONGEST, token_file
from tasks.os_interaction.episode import ShellEpisode


@dataclass
class ServerSettings(Settings):
    port: int = setting(8000, "port on 127.0.0.1", group="the server")
    token_file: str = setting("", "where the token is written; empty: in the cache folder")
    most_sessions: int = setting(64, "episodes at the same time")
    idle_seconds: int = setting(1800, "an episode that nobody asked for so long is ended")
    session_seconds: int = setting(7200, "no episode lasts longer")
    body_bytes: int = setting(1_000_000, "largest request")


@dataclass
class ServerConfig(TaskSettings, ServerSettings):
    """The server's settings, and the task's."""


@dataclass
class Session:
    """An episode that a client plays, and when it began and was last asked for."""

    episode: ShellEpisode
    began: float
    asked: float
    lock: asyncio.Lock


class Sessions:
    """The episodes that are going on."""

    def __init__(self, config: Any, make: Callable[[str], ShellEpisode]):
        self.config, self.make_episode = config, make
        self.open: dict[str, Session] = {}
        self.ending: set[asyncio.Task] = set()  # those that the reaper closes
        self.pool = ThreadPoolExecutor(max(4, config.most_sessions), thread_name_prefix="episode")

    async def call(self, function: Callable, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def start(self, name: str) -> tuple[str, list[dict[str, str]]]:
        """A new episode: its session's name and its opening messages. Raises OverflowError where there are too many."""
        if len(self.open) >= self.config.most_sessions:
            raise OverflowError(
                f"{self.config.most_sessions} episodes are going on (most_sessions): close one, or wait"
            )
        key, now = uuid.uuid4().hex, time.monotonic()
        session = self.open[key] = Session(self.make_episode(name), now, now, asyncio.Lock())
        try:
            async with session.lock:
                return key, await self.call(session.episode.reset)
        except BaseException:
            self.open.pop(key, None)
            raise

    @contextlib.asynccontextmanager
    async def at(self, key: str) -> AsyncIterator[ShellEpisode]:
        """The episode of a session, for one request at a time. Raises KeyError."""
        session = self.open[key]
        async with session.lock:
            if self.open.get(key) is not session:  # it was closed while this request stood in line
                raise KeyError(key)
            session.asked = time.monotonic()
            yield session.episode
            session.asked = time.monotonic()

    async def close(self, key: str) -> None:
        """Ends a session. What goes wrong is told of and ends neither the reaper nor the server."""
        if session := self.open.pop(key, None):
            try:
                async with session.lock:
                    await self.call(session.episode.close)
            except Exception as error:
                print(f"session {key} did not end well: {clean(repr(error))}", file=sys.stderr, flush=True)

    async def reap(self) -> None:
        """Ends, for ever, the episodes that nobody asks for any more. A busy one keeps none of the others waiting."""
        while True:
            await asyncio.sleep(min(5.0, self.config.idle_seconds / 4))
            now = time.monotonic()
            for key, one in list(self.open.items()):
                idle = not one.lock.locked() and now - one.asked > self.config.idle_seconds
                if idle or now - one.began > self.config.session_seconds:
                    self.ending.add(task := asyncio.create_task(self.close(key)))
                    task.add_done_callback(self.ending.discard)


def application(config: Any, entries: list, make: Callable, rules: Any, token: str):
    """The server as an ASGI application."""
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from pydantic import BaseModel, Field

    by_name = {entry.name: entry for entry in entries}
    sessions = Sessions(config, lambda name: ShellEpisode(by_name[name], make, rules))
    hosts = {f"127.0.0.1:{config.port}", f"localhost:{config.port}"}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        reaper = asyncio.create_task(sessions.reap())
        yield
        reaper.cancel()
        await asyncio.gather(*sessions.ending, *map(sessions.close, list(sessions.open)))
        sessions.pool.shutdown()
        remove_token(Path(config.token_file), token)  # here: what stopped the server ends the program after this

    app = FastAPI(title="Shell tasks", lifespan=lifespan, version="1")
    app.state.sessions = sessions

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable):
        """No other host's name (DNS rebinding), no other site's page, no large body."""
        origin = request.headers.get("origin")
        if request.headers.get("host", "") not in hosts:
            return JSONResponse({"detail": "this Host is not served: use 127.0.0.1"}, 421)
        if origin is not None and origin not in {f"http://{host}" for host in hosts}:
            return JSONResponse({"detail": "this Origin is not served"}, 403)
        if request.method == "POST":
            size = 0
            parts = []
            async for part in request.stream():
                size += len(part)
                if size > config.body_bytes:
                    return JSONResponse({"detail": f"the body is larger than {config.body_bytes} bytes"}, 413)
                parts.append(part)
            request._body = b"".join(parts)  # read once; what comes next finds it here, as after `body()`
            request.scope["headers"] = [  # `curl -d` says a form, and means JSON
                (name, b"application/json" if name == b"content-type" else value)
                for name, value in request.scope["headers"]
            ]
        return await go_on(request)

    bearer = Depends(HTTPBearer(auto_error=False, description="the token that the server wrote at its start"))

    def authorized(credentials: HTTPAuthorizationCredentials | None = bearer) -> None:
        given = credentials.credentials if credentials else ""
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, f"the token is missing or wrong: it stands in {config.token_file}")

    class Reset(BaseModel):
        name: str

    class One(BaseModel):
        session: str

    class Step(One):
        reply: str = Field(max_length=LONGEST)

    @app.post("/api/ping", summary="Whether the server is there; no token needed")
    async def ping() -> dict[str, Any]:
        return {"ok": True, "entries": len(by_name), "sessions": len(sessions.open)}

    @app.get("/api/samples", dependencies=[Depends(authorized)], summary="The entries, without their checks")
    async def samples() -> list[dict[str, Any]]:
        names = ("name", "instruction", "skills", "level", "key")
        return [{name: getattr(entry, name) for name in names} for entry in entries]

    @app.get("/api/rules", dependencies=[Depends(authorized)], summary="The settings that decide an episode")
    async def rules_told() -> dict[str, Any]:
        return {name: getattr(config, name) for name in (*PLAYED_BY, "most_sessions")}

    @app.post("/api/reset", dependencies=[Depends(authorized)], summary="Begins an episode")
    async def reset(body: Reset) -> dict[str, Any]:
        if body.name not in by_name:
            raise HTTPException(404, f"there is no entry {body.name[:100]!r}")
        try:
            session, messages = await sessions.start(body.name)
        except OverflowError as error:
            raise HTTPException(429, str(error)) from None
        return {"session": session, "messages": messages}

    @contextlib.asynccontextmanager
    async def found(key: str) -> AsyncIterator[ShellEpisode]:
        try:
            async with sessions.at(key) as episode:
                yield episode
        except KeyError:
            raise HTTPException(404, "there is no such session: closed, or ended by idle_seconds") from None

    @app.post("/api/step", dependencies=[Depends(authorized)], summary="A reply; the next message, null at the end")
    async def step(body: Step) -> dict[str, Any]:
        async with found(body.session) as episode:
            return {"message": await sessions.call(episode.step, body.reply), "reason": episode.reason}

    @app.post("/api/outcome", dependencies=[Depends(authorized)], summary="The verdict; the episode is over then")
    async def outcome(body: One) -> dict[str, Any]:
        async with found(body.session) as episode:
            verdict = asdict(await sessions.call(episode.outcome))
        await sessions.close(body.session)
        return verdict

    @app.post("/api/close", dependencies=[Depends(authorized)], summary="Ends an episode without a verdict")
    async def close(body: One) -> dict[str, Any]:
        await sessions.close(body.session)
        return {"ok": True}

    return app


def serve(config: ServerConfig) -> int:
    """Serves until it is told to stop. Raises ConfigError where it can't begin."""
    import socket

    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise ConfigError("the server needs packages: pip install fastapi uvicorn httpx") from None
    for name in NOT_ITS_OWN:
        if getattr(config, name) != getattr(TaskSettings(), name):
            raise ConfigError(f"{name} is a setting of training and evaluation: leave it out here")
    for name in ("most_sessions", "idle_seconds", "session_seconds", "body_bytes"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected at least 1")
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port={config.port} is out of range: expected 0 (a free one) to 65535")
    if config.session_seconds < config.max_rounds * config.command_seconds:
        raise ConfigError(
            f"session_seconds={config.session_seconds} is less than max_rounds={config.max_rounds} times "
            f"command_seconds={config.command_seconds:g}: an episode could outlast it, raise it"
        )
    entries, make, rules = ready(config)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", config.port))
        listening.listen()  # from here on, so that what connects after "serves" is told below waits its turn
    except OSError as error:
        raise ConfigError(f"port={config.port} can't be had ({error.strerror}): set another port") from None
    config.port = listening.getsockname()[1]  # with port=0, the one that was free
    token, path = secrets.token_urlsafe(32), token_file(config.port, config.token_file)
    config.token_file = str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    app = application(config, entries, make, rules, token)
    print(f"http://127.0.0.1:{config.port} serves {len(entries)} entries; token: {path}", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listening])
    finally:
        remove_token(path, token)
    return 0


def remove_token(path: Path, token: str) -> None:
    """Removes a server's token, not that of its successor on the same port."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == token:
            path.unlink()


USAGE = """usage: python -m tasks.os_interaction.server [--config FILE] [name=value ...] [-- name=value ...]

Serves episodes at the shell on 127.0.0.1. FILE, and what follows --, may be training's: what is not the server's in
there is passed over.
"""
NOT_ITS_OWN = ("server", "server_token", "entry_levels")  # train.py's and evaluate.py's alone


def settings_from(arguments: Sequence[str]) -> ServerConfig:
    """The settings from a command line, as USAGE says. Raises ConfigError."""
    words = [*arguments, "--"]
    own, theirs = words[: words.index("--")], words[words.index("--") + 1 : -1]
    file, pairs = split_arguments(ServerConfig, own)
    names = {one.name for one in fields(ServerConfig)} - {*NOT_ITS_OWN}
    for word, after in zip(theirs, [*theirs, ""][1:], strict=True):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else name
        if not equals:
            value = after if after and "=" not in after and not after.startswith("--") else "true"
        if name in names and (equals or word.startswith("--")):
            pairs.append((name, value))
    own = {name: value for name, value in (read_yaml(file) if file else {}).items() if name in names}
    words = [f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in own.items()]
    return parse(ServerConfig, words + [f"{name}={value}" for name, value in pairs])


@program
def main() -> int:
    """The program. Exit status: 0; 2 for bad settings or no sandbox; 130 after Ctrl-C."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(help_text(ServerConfig, USAGE))
        return 0
    return serve(settings_from(sys.argv[1:]))


if __name__ == "__main__":
    raise SystemExit(run_program(main))
