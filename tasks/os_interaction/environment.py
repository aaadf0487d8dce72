"""Shell tasks in the shapes that other libraries train on: TRL's `environment_factory`, and OpenEnv.

    from tasks.os_interaction.environment import environment_factory, training_rows
    trainer = GRPOTrainer(model, args=..., train_dataset=Dataset.from_list(training_rows()),
                          environment_factory=environment_factory())

    python -m tasks.os_interaction.environment [port=8001] [name=value ...]      an OpenEnv server (the extra openenv)

TRL's trainer calls reset with a row's columns, offers the public methods to the model as tools, and asks for the
reward at the end. OpenEnv's clients send an action (`commands`, or `finish`) and get an observation.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_ppo.settings import ConfigError, Settings, help_text, parse, setting
from lora_ppo.streams import run_program
from lora_ppo.terminal import program
from tasks.os_interaction import TaskSettings, ready, split
from tasks.os_interaction.entries import Entry
from tasks.os_interaction.episode import FINISH, ShellEpisode, bash_reply
from tasks.os_interaction.plain import Nothing


def settings(**changes: Any) -> TaskSettings:
    """The task's settings with these changes. Raises ConfigError for a name that there is not."""
    try:
        return TaskSettings(**changes)
    except TypeError as error:
        raise ConfigError(str(error).partition(") ")[2]) from None


def played_here(config: TaskSettings) -> tuple[list[Entry], Callable, Any]:
    """The entries of the levels that are wanted, what makes sandboxes, and the rules. Raises ConfigError."""
    for name in ("server", "server_token"):
        if getattr(config, name):
            raise ConfigError(f"{name} is a setting of train.py and evaluate.py: leave it out here")
    entries, make, rules = ready(config)
    wanted = [entry for entry in entries if not entry.level or entry.level in config.entry_levels]
    if not wanted:
        raise ConfigError(f"entry_levels={','.join(config.entry_levels)}: there is no entry of these levels")
    return wanted, make, rules


def training_rows(test_share: float = 0.2, **changes: Any) -> list[dict[str, Any]]:
    """A row for each training entry: the opening messages, and the entry's name, which `reset` is called with."""
    config = settings(**changes)
    train = split(played_here(config)[0], test_share, config.entry_levels)["train"]
    told = "You work on a Linux system, as root. Use the tools to do the task, then finish. The task: "
    return [{"prompt": [{"role": "user", "content": told}], "name": entry.name} for entry in train]


def environment_factory(**changes: Any) -> Callable[[], "ShellEnvironment"]:
    """What TRL's `environment_factory` takes; `changes` are settings of the task. Raises ConfigError."""
    entries, make, rules = played_here(settings(**changes))
    return partial(ShellEnvironment, {entry.name: lambda e=entry: ShellEpisode(e, make, rules) for entry in entries})


class ShellEnvironment:
    """One system at a time, as TRL's trainers use it. Its public methods are the model's tools."""

    def __init__(self, episodes: dict[str, Callable[[], ShellEpisode]]):
        self._episodes, self._episode, self._over = episodes, None, True

    def reset(self, name: str, **row: Any) -> str:
        """Begins the entry of this name; returns its instruction."""
        if self._episode is not None:
            self._episode.close()
        self._episode, self._over = self._episodes[name](), False
        return self._episode.reset()[-1]["content"]

    def bash(self, commands: str) -> str:
        """
        Runs Bash commands as root, in a new shell; files stay, the working directory and variables don't.

        Args:
            commands: The commands to run.

        Returns:
            What they printed.
        """
        return self._step(bash_reply(commands))

    def finish(self) -> str:
        """
        Says that the task is done.

        Returns:
            A confirmation.
        """
        return self._step(FINISH)

    def _step(self, reply: str) -> str:
        if self._over:
            return "The task is over."
        self._over = self._episode.step(reply) is None
        return self._episode.shown[-1]["said"] if self._episode.shown else "The task is over."

    def get_reward(self) -> float | None:
        """1.0 for a system that passes the check, -0.5 for one that doesn't, None where that can't be known."""
        outcome = self._episode.outcome()
        return None if outcome.verdict == "unknown" else outcome.reward


# ----------------------------------------------------------------------------------------------------------- openenv


NO_TOKEN = (
    "sandbox=none is not served here: OpenEnv's protocol has no token, and any user of this machine could run commands "
    "as you; set sandbox=namespaces or docker"
)


@dataclass
class OpenEnvSettings(Settings):
    port: int = setting(8001, "port on 127.0.0.1", group="the OpenEnv server")
    most_sessions: int = setting(64, "episodes at the same time")


@dataclass
class OpenEnvConfig(TaskSettings, OpenEnvSettings):
    """The server's settings, and the task's."""


class OwnPages:
    """Middleware that serves no other host's name (DNS rebinding) and no other site's page, be it by a web socket."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        told = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        host, origin = told.get(b"host", ""), told.get(b"origin")
        own = host.partition(":")[0] in ("127.0.0.1", "localhost") and origin in (None, f"http://{host}")
        if own or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this Host, or Origin, is not served: use 127.0.0.1"})


def openenv_application(entries: Sequence[Entry], make: Callable, rules: Any, most_sessions: int):
    """The OpenEnv server as an ASGI application. Raises ConfigError without a sandbox, or without the package."""
    if make is Nothing:
        raise ConfigError(NO_TOKEN)
    try:
        from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    except ImportError as error:
        raise ConfigError(f"OpenEnv is not installed ({error}): pip install openenv==0.10.0") from None
    by_name = {entry.name: entry for entry in entries}

    class ShellAction(Action):
        commands: str = ""
        finish: bool = False

    class ShellObservation(Observation):
        text: str = ""

    class OpenShell(Environment):
        """A session's environment."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self):
            super().__init__()
            self.episode, self.steps, self.number = None, 0, None

        def reset(self, seed: int | None = None, episode_id: str | None = None, **row: Any):
            """Begins the entry `name`, or one that the seed picks."""
            self.close()
            name = row.get("name") or list(by_name)[(seed or 0) % len(by_name)]
            if name not in by_name:
                raise ValueError(f"there is no entry {name[:100]!r}")
            self.episode, self.steps, self.number = ShellEpisode(by_name[name], make, rules), 0, episode_id
            return ShellObservation(text=self.episode.reset()[-1]["content"], metadata={"name": name})

        def step(self, action: ShellAction, timeout_s: float | None = None, **more: Any):
            if self.episode is None:
                raise ValueError("reset comes first")
            self.steps += 1
            over = self.episode.step(FINISH if action.finish else bash_reply(action.commands)) is None
            text = self.episode.shown[-1]["said"] if self.episode.shown else ""
            if not over:
                return ShellObservation(text=text)
            outcome = self.episode.outcome()
            reward = None if outcome.verdict == "unknown" else outcome.reward
            details = {"verdict": outcome.verdict, "why": outcome.why, **outcome.details}
            return ShellObservation(text=text, done=True, reward=reward, metadata=details)

        @property
        def state(self):
            return State(episode_id=self.number, step_count=self.steps)

        def close(self) -> None:
            if self.episode is not None:
                self.episode.close()

    app = create_fastapi_app(OpenShell, ShellAction, ShellObservation, max_concurrent_envs=most_sessions)
    app.add_middleware(OwnPages)
    return app


@program
def main() -> int:
    """The OpenEnv server. Exit status: 0; 2 for bad settings or no sandbox; 130 after Ctrl-C."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(help_text(OpenEnvConfig, "usage: python -m tasks.os_interaction.environment [name=value ...]\n"))
        return 0
    config = parse(OpenEnvConfig, sys.argv[1:])
    if config.sandbox == "none":
        raise ConfigError(NO_TOKEN)  # before any entry is tried
    if not 1 <= config.port <= 65535:
        raise ConfigError(f"port={config.port} is out of range: expected 1 to 65535")
    entries, make, rules = played_here(config)
    app = openenv_application(entries, make, rules, config.most_sessions)
    import uvicorn

    print(f"OpenEnv at http://127.0.0.1:{config.port}: {len(entries)} entries", file=sys.stderr, flush=True)
    uvicorn.run(app, host="127.0.0.1", port=config.port, log_level="warning")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
