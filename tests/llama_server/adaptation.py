"""A pytest plugin that adapts llama-server's tests to a stand-in for their model.

Texts and token counts that only the tests' own model produces are not compared. The tests in
cannot_pass.toml are expected to fail: a listed test that passes fails the run.
"""

import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tomlkit
from requests.structures import CaseInsensitiveDict

from llama_server import launcher

_LIST = tomlkit.parse(Path(__file__).with_name("cannot_pass.toml").read_text("utf-8")).unwrap()
_REASONS = {name: entry["reason"] for entry in _LIST["tests"] for name in entry["names"]}
_FILES: dict[str, str] = _LIST["files"]
_TEXTS = frozenset(_LIST["model"]["texts"])
_COUNTS = frozenset(_LIST["model"]["counts"])
_reported: Counter[str] = Counter()
_excluded: Counter[str] = Counter()

# The tests download nothing, but their helpers import this package.
sys.modules["wget"] = ModuleType("wget")


_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(["llama_server.launcher"])


class ForkedServer:
    """A server in a child process, with the members of subprocess.Popen that the tests use."""

    def __init__(self, command: list[str], **ignored: Any) -> None:
        arguments = (command[1:], os.environ["POP_SERVER_LOG"])
        self._process = _fork.Process(target=launcher.main, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("llama-server", timeout or 0.0)


class AnyCount:
    """Equal to each positive number of tokens."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other > 0

    __hash__ = None  # type: ignore[assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = []
    for item in items:
        if reason := _FILES.get(item.path.name):
            _excluded[f"{item.path.name}: {reason}"] += 1
        else:
            kept.append(item)
            _adapt(item)
    items[:] = kept


def _adapt(item: pytest.Item) -> None:
    for name in _COUNTS & set(params := getattr(getattr(item, "callspec", None), "params", {})):
        params[name] = AnyCount()
    module: Any = getattr(item, "module", None)
    if hasattr(module, "match_regex"):
        module.match_regex = _match
    whole = f"{item.path.name}::{item.name}"
    reason = _REASONS.get(whole) or _REASONS.get(whole.partition("[")[0])
    if reason:
        item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _match(regex: str, text: str) -> bool:
    if regex in _TEXTS:
        return bool(text)
    flags = re.IGNORECASE | re.MULTILINE | re.DOTALL
    return re.search(regex, text, flags=flags) is not None


def pytest_collection_finish(session: pytest.Session) -> None:
    utils: Any = sys.modules.get("utils")
    if utils is None:
        return
    utils.subprocess = SimpleNamespace(Popen=ForkedServer, TimeoutExpired=subprocess.TimeoutExpired)
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # it would download the models
    request = utils.ServerProcess.make_request

    def make_request(self: Any, method: str, path: str, data: Any = None, *rest: Any, **more: Any):
        # llama-server shows the prompt of each request if it was started with --verbose.
        if self.debug and isinstance(data, dict):
            data = {"verbose": True, **data}
        response = request(self, method, path, data, *rest, **more)
        response.headers = CaseInsensitiveDict(response.headers)
        return response

    utils.ServerProcess.make_request = make_request


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "wasxfail") and report.skipped:
        _reported[report.wasxfail] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("tests that cannot pass")
    for reason, n in (_reported + _excluded).most_common():
        terminalreporter.write_line(f"{n:4} {reason}")
