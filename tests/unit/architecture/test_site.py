"""Check the site of the documents (docs/site). `make site` builds it and fails on any warning."""

import importlib.util
import re
from types import ModuleType

from support.paths import ROOT

SITE = ROOT / "docs" / "site"
CONFIG = (SITE / "mkdocs.yml").read_text(encoding="utf-8")


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", SITE / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def test_navigation_lists_each_guide_once() -> None:
    pages = re.findall(r"^ +- (?:Home: )?([\w./-]+\.md)$", CONFIG.split("\nnav:\n")[1], re.M)
    folders = (ROOT / "docs", ROOT / "docs" / "internals")
    guides = [path.relative_to(ROOT / "docs") for folder in folders for path in folder.glob("*.md")]
    expected = {path.as_posix() for path in guides} | hooks.OUTSIDE.keys() | {"notebook/README.md"}
    assert sorted(pages) == sorted(expected)


def test_links_lead_to_pages_or_to_the_repository() -> None:
    text = (
        "[a](docs/models.md#hub) ![b](docs/images/ttft.png) [c](CONTRIBUTING.md) [`d`](NOTICE)\n"
        "[e](https://x.org) [f](#here) [g](patches/README.md)\n\n    [code](docs/models.md)\n"
    )
    fitted = hooks.fitted(text, "index.md", "")
    assert fitted == (
        "[a](models.md#hub) ![b](images/ttft.png) [c](contributing.md) `d`\n"
        "[e](https://x.org) [f](#here) [g](internals/hooks.md)\n\n    [code](docs/models.md)\n"
    )
    linked = hooks.fitted("[x](../../patches/tool.py)", "internals/kernels.md", "https://h/o/r/")
    assert linked == "[x](https://h/o/r/blob/main/patches/tool.py)"


def test_glossary_words_have_their_meaning() -> None:
    text = hooks.glossary(hooks.GLOSSARY.read_text(encoding="utf-8"))
    assert text.count("\n") > 20
    assert "*[Sidecar]: a small GGUF file" in text and "*[refill]: running" in text
    assert "*[full token]: a token that runs through all layers" in text
