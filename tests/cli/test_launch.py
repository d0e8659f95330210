"""Test `pop-local launch` with a program in the agent's place on PATH."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pop_local.commands.agents import AGENTS
from support.program import called, run

URL = re.compile(r"http://127\.0\.0\.1:\d+/v1")
# Reports its settings, sends a request, and then ends with code 3, or 7 after Ctrl-C.
AGENT = f"""#!{sys.executable}
import json, os, re, signal, sys, time, urllib.request
from pathlib import Path
def stop(*_):
    sys.exit(7)
signal.signal(signal.SIGINT, stop)
given = " ".join([*sys.argv, *(name + "=" + value for name, value in os.environ.items())])
key = re.search('(?:apiKey": "|_KEY=|--openai-api-key )([A-Za-z0-9_-]{{43}})', given)[1]
url = re.search(r"http://127[.]0[.]0[.]1:[0-9]+/v1", given)[0]
asking = urllib.request.Request(url + "/models", headers={{"Authorization": "Bearer " + key}})
models = json.load(urllib.request.urlopen(asking))["data"]
report = {{"arguments": sys.argv[1:], "url": url, "models": models, "pid": os.getpid()}}
report["key"] = os.environ.get("POP_LOCAL_API_KEY")
part = Path("report.part")
part.write_text(json.dumps(report))
part.rename("report")
time.sleep(60 if "wait" in sys.argv else 0)
sys.exit(3)
"""


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder in which the agents' programs find their work. HOME is an empty folder."""
    handler = signal.getsignal(signal.SIGINT)
    for name in ("bin", "home", "work"):
        (tmp_path / name).mkdir()
    for entry in AGENTS.values():
        program = tmp_path / "bin" / entry.program
        program.write_text(AGENT)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "work"
    signal.signal(signal.SIGINT, handler)  # `launch` leaves Ctrl-C to the agent


def launching(tiny: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `launch` in a new session, as a terminal does."""
    command = [sys.executable, "-m", "pop_local", "launch", "codex", tiny, "--threads", "1"]
    return subprocess.Popen([*map(str, command), "--", *arguments], start_new_session=True)


def report_of(folder: Path, process: "subprocess.Popen[bytes] | None" = None) -> Any:
    report = folder / "report"
    while process is not None and not report.exists() and process.poll() is None:
        time.sleep(0.05)
    return json.loads(report.read_text())


def assert_ended(report: Any) -> None:
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(report["url"] + "/models")
    with pytest.raises(ProcessLookupError):
        os.kill(report["pid"], 0)


@pytest.mark.parametrize("name", AGENTS)
def test_server_stops_with_agent(name, agent, tiny, monkeypatch):
    monkeypatch.setenv("POP_LOCAL_API_KEY", "the user's key")
    done = called("launch", name, tiny, "--ctx", 4096, "--threads", 1, "--", "do", "--it well")
    assert done.returncode == 3, done.stderr
    report = report_of(agent)
    assert report["arguments"][-2:] == ["do", "--it well"]
    assert report["key"] is None
    [model] = report["models"]
    assert model["id"] == "tiny"
    assert_ended(report)
    settings = [path for path in agent.parent.joinpath("home").rglob("*") if path.is_file()]
    assert [path for path in settings if "pop-local" not in str(path)] == []


@pytest.mark.parametrize(
    ("send", "number", "status"),
    [(os.killpg, signal.SIGINT, 7), (os.kill, signal.SIGTERM, 128 + signal.SIGTERM)],
    ids=["ctrl-c", "termination"],
)
def test_signal_stops_agent_and_server(agent, tiny, send, number, status):
    """Ctrl-C in a terminal reaches both processes, and the agent handles it."""
    process = launching(tiny, "wait")
    report = report_of(agent, process)
    send(process.pid, number)
    assert process.wait(60) == status
    assert_ended(report)


def test_reports_server_that_cannot_start(agent, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    done = run("launch", "aider", broken)
    assert (done.returncode, (agent / "report").exists()) == (1, False)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    done = run("launch", "aider", tmp_path / "tiny.gguf", "--sidecar", broken)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1


def test_missing_agent_error_contains_install_command(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = called("launch", "qwen-code", tiny)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: qwen-code is not installed",
        "hint: install it with: npm install -g @qwen-code/qwen-code",
    ]


@pytest.mark.parametrize("name", AGENTS)
def test_print_option_only_prints_shell_commands(name, tmp_path):
    model = tmp_path / 'odd "name" $x.gguf'
    done = called("launch", name, model, "--print", "--threads", 1, "--", "two words")
    assert (done.returncode, done.stderr) == (0, "")
    server, shown = map(shlex.split, done.stdout.splitlines())
    named = ["--name=odd-name-x", f"--ctx={AGENTS[name].n_ctx}", "--threads=1"]
    assert server[:6] == ["pop-local", "serve", str(model), *named]
    assert server[6:] == ["--gpu-layers=-1", "--port=8080"]
    assert AGENTS[name].program in shown and shown[-1] == "two words"
    assert not re.search(r"[\w-]{43}", done.stdout)
    assert "http://127.0.0.1:8080/v1" in done.stdout and "odd-name-x" in shlex.join(shown)


def test_opencode_settings_are_json():
    words = AGENTS["opencode"].command((), url="http://h/v1", key="k", model="m", n_ctx=4096)
    settings = json.loads(words[1].removeprefix("OPENCODE_CONFIG_CONTENT="))
    assert settings["model"] == "pop-local/m"
    assert settings["provider"]["pop-local"]["options"]["apiKey"] == "k"
    assert settings["provider"]["pop-local"]["models"]["m"]["limit"]["context"] == 4096


@pytest.mark.parametrize("name", ["codex", "qwen-code"])
def test_idle_limit_of_agents_is_one_hour(name):
    words = AGENTS[name].command((), url="http://h/v1", key="k", model="m", n_ctx=4096)
    assert re.search(r"(?i)idle_timeout_ms=3600000\b", " ".join(words))


def test_rejects_arguments_without_model():
    done = called("launch", "codex", "--", "--help")
    assert done.returncode == 2 and "pass a model before" in done.stderr
