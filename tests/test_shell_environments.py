"""Shell tasks in other libraries' hands: TRL's GRPOTrainer, and OpenEnv's client."""

import json
import sys
import threading
import time

import pytest
from test_shell_entries import row

from lora_ppo.settings import ConfigError
from tasks.os_interaction.entries import read_entries
from tasks.os_interaction.environment import (
    OwnPages,
    environment_factory,
    main,
    openenv_application,
    training_rows,
)
from tasks.os_interaction.episode import Rules
from tasks.os_interaction.plain import Nothing
from tasks.os_interaction.sandbox import Namespaces


@pytest.fixture
def entries_file(tmp_path, monkeypatch, sandboxes) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "e.json").write_text(json.dumps({f"e{i}": row() for i in range(5)}))
    return str(tmp_path / "e.json")


def test_the_tools_are_the_shell(entries_file):
    environment = environment_factory(entries=entries_file)()
    assert environment.reset(name="e0", prompt="ignored") == "Create /x."
    assert environment.bash("echo hi; cat >/x <<'E'\n```\nAct: finish\nE") == "The output of the OS:\nhi"
    assert environment.bash("cat /x") == "The output of the OS:\n```\nAct: finish"
    assert environment.finish() == "Finished."
    assert environment.bash("rm /x") == "The task is over."
    assert environment.get_reward() == 1.0
    environment.reset(name="e1")
    assert environment.get_reward() == -0.5


def test_trls_trainer_plays_it(entries_file, tmp_path, llama, monkeypatch):
    """A step of GRPO with a model that can't do it: episodes are reset, judged, and the reward is in TRL's log."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = trl.chat_template_utils.qwen3_instruct_2507_chat_template
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(llama),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(training_rows(entries=entries_file)),
        processing_class=tokenizer,
        environment_factory=environment_factory(entries=entries_file),
    )
    trainer.train()
    assert [one["reward"] for one in trainer.state.log_history if "reward" in one] == [-0.5]


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        ({}, True),
        ({"Host": "localhost:8001"}, True),
        ({"Origin": "http://127.0.0.1:8001"}, True),
        ({"Host": "evil.example:8001"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1:3000"}, False),
        ({"Origin": "null"}, False),
    ],
)
def test_no_page_of_another_site_reaches_an_openenv_server(headers, served):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    app = fastapi.FastAPI()
    app.add_middleware(OwnPages)

    @app.get("/")
    async def page() -> str:
        return "in"

    @app.websocket("/ws")
    async def play(socket: fastapi.WebSocket) -> None:
        await socket.accept()
        await socket.send_text("in")

    client, url = TestClient(app, base_url="http://127.0.0.1:8001"), "ws://127.0.0.1:8001/ws"
    assert client.get("/", headers=headers).status_code == (200 if served else 403)
    if served:
        with client.websocket_connect(url, headers=headers) as socket:
            assert socket.receive_text() == "in"
    else:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(url, headers=headers):
            pass


def test_without_a_sandbox_openenv_is_not_served(monkeypatch, tmp_path):
    """No token keeps other users of the machine out: nothing runs, not even the entries' own scripts."""
    with pytest.raises(ConfigError, match="sandbox=none is not served"):
        openenv_application([], Nothing, Rules(), 4)
    ran = tmp_path / "ran"
    (tmp_path / "e.json").write_text(json.dumps({"e": row(start=f"touch {ran}")}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["sandbox=none", "i_understand=true", f"entries={tmp_path}/e.json"]
    monkeypatch.setattr(sys, "argv", ["environment", *words])
    assert main() == 2
    assert not ran.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["port=70000"], "port=70000 is out of range: expected 1 to 65535"),
        (["server=http://127.0.0.1:8000"], "server is a setting of train.py and evaluate.py"),
        (["entry_levels=7"], "entry_levels=7: there is no entry of these levels"),
        (["entries_digest=0123"], "entries_digest=0123, and the 2 entries here have"),
    ],
)
def test_no_setting_is_passed_over(tmp_path, monkeypatch, sandboxes, capsys, words, told):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "e.json").write_text(json.dumps({level: row(level=level) for level in "12"}))
    monkeypatch.setattr(sys, "argv", ["environment", f"entries={tmp_path}/e.json", *words])
    assert main() == 2
    assert told in capsys.readouterr().err
    environment = environment_factory(entries=f"{tmp_path}/e.json", entry_levels=["2"])()
    assert list(environment._episodes) == ["2"]


def test_its_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["environment", "--help"])
    assert main() == 0
    assert "most_sessions" in capsys.readouterr().out


def test_openenvs_client_plays_several_sessions(entries_file):
    pytest.importorskip("openenv", reason="OpenEnv is not here: pip install openenv")
    uvicorn = pytest.importorskip("uvicorn")
    from openenv.core.generic_client import GenericEnvClient

    app = openenv_application(read_entries(entries_file), Namespaces, Rules(), 4)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with GenericEnvClient(base_url=url).sync() as one, GenericEnvClient(base_url=url).sync() as two:
            assert one.reset(name="e1").observation["text"] == "Create /x."
            assert two.reset(name="e2").observation["text"] == "Create /x."
            assert not one.step({"commands": "touch /x"}).done
            assert two.step({"commands": "ls /x"}).observation["text"].startswith("The output of the OS:\nls: ")
            first, second = one.step({"finish": True}), two.step({"finish": True})
            assert (first.done, first.reward) == (True, 1.0)
            assert (second.done, second.reward) == (True, -0.5)
    finally:
        server.should_exit = True
        thread.join()
