"""Check that CUDA and Metal support each node that our hooks add to a graph.

If a backend lacks an operation, ggml computes it on the CPU in the middle of the graph and copies
its operands between the devices.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

from support import gpu_tables
from support.gpu_tables import Node, nodes

HOOKS = Path(__file__).parents[3] / "patches/llama.cpp/src"
CALL = re.compile(r"\b(ggml_\w+)\((?:g\.|n\.)?ctx0?,")
# These functions add no node of a hook.
NO_NODE = {"ggml_get_next_tensor", "ggml_new_tensor_2d", "ggml_new_tensor_3d"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Node, ...]:
    if sys.platform == "win32" or shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler with GCC's options")
    return nodes(tmp_path_factory.mktemp("tables"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "metal", "metal_without_bf16"])
def test_gpus_support_each_node_that_the_hooks_add(found, backend):
    ours = [node for node in found if not node.name.startswith("unsupported")]
    assert len(ours) > 60
    lacking = [(node.name, node.operation) for node in ours if not getattr(node, backend)]
    assert lacking == []


def test_list_of_nodes_is_complete():
    """Require an entry in gpu_tables.cpp for each ggml function that a hook calls."""
    hooks = "".join(path.read_text() for path in sorted(HOOKS.glob("*")) if path.is_file())
    listed = set(CALL.findall(Path(gpu_tables.__file__).with_suffix(".cpp").read_text()))
    assert set(CALL.findall(hooks)) - NO_NODE == listed - NO_NODE
