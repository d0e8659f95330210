"""Vercel's AI SDK (npm's ai 6.0 and @ai-sdk/openai-compatible 2.0) against `pop-local serve`.

POP_TEST_NODE names the folder in which `npm install ai @ai-sdk/openai-compatible` was run.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.chat_tools import DOUBLE

MODULES = Path(os.environ.get("POP_TEST_NODE", "")) / "node_modules"
pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and (MODULES / "ai").exists()),
    reason="set POP_TEST_NODE to a folder with the npm packages",
)


def test_ai_sdk_calls_tool_and_streams(server, tmp_path):
    script = shutil.copy(Path(__file__).with_name("ai_sdk.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())
    parameters = json.dumps(DOUBLE["function"]["parameters"])
    command = ["node", str(script), server.api, parameters]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["input"]["n"] in range(10) and result["output"] == 2 * result["input"]["n"]
    assert result["reason"] == "tool-calls"
    assert result["streamed"] == result["whole"] != ""
    assert result["usage"]["outputTokens"] == 8 and result["usage"]["inputTokens"] > 0
