"""Check that a tag, the versions, the changelog, and the wheels fit together; pytest imports this.

    python tests/check_release.py TAG [WHEELS]

TAG must be "v" and pop-local's version, the changelog must have a dated section for that version,
and pop-local must require the backend's version. WHEELS must contain pop-local's wheel and one
wheel of the backend for each system, none of which exceeds the package index's limit. The links of
pop-local's description must be absolute. The exit status is 1 if a check fails.
"""

import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from absolute_links import relative_links

ROOT = Path(__file__).parents[1]
APP, BACKEND = "pop-local", "pop-local-llama-cpp"
SYSTEMS = {
    "Linux on x86-64": r"manylinux_\d+_\d+_x86_64",
    "Linux on ARM": r"manylinux_\d+_\d+_aarch64",
    "macOS on ARM": r"macosx_\d+_\d+_arm64",
    "Windows": r"win_amd64",
}
LIMIT_BYTES = 100 * 10**6  # of a file on PyPI


def versions(root: Path) -> tuple[str, str, str]:
    """Return the versions of pop-local, of the backend, and of the backend that it requires."""
    app = _one(r'^__version__ = "(.+)"$', root / "pop_local/__init__.py")
    backend = _one(r'^version = "(.+)"$', root / "patches/llama-cpp-python/pyproject.toml")
    return app, backend, _one(rf'^    "{BACKEND}==(.+)",$', root / "pyproject.toml")


def problems(root: Path, tag: str, wheels: Path | None) -> Iterator[str]:
    """Yield a message for each check that fails."""
    app, backend, required = versions(root)
    if tag != f"v{app}":
        yield f"the tag is {tag}, but pop_local/__init__.py contains version {app}"
    if backend != required:
        yield f"pyproject.toml requires {BACKEND} {required}, but its version is {backend}"
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(app)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no line such as: ## [{app}] - 2027-01-31"
    if wheels is not None:
        yield from _wheel_problems(wheels, {APP: app, BACKEND: backend})


def _wheel_problems(folder: Path, expected: dict[str, str]) -> Iterator[str]:
    missing = {f"{BACKEND} for {system}": pattern for system, pattern in SYSTEMS.items()}
    missing[f"{APP} for every system"] = "any"
    for path in sorted(folder.iterdir()):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            yield f"{path.name} is not a wheel"
            continue
        if expected.get(name) != str(version):
            yield f"{path.name} is neither {' nor '.join(map(' '.join, expected.items()))}"
        if path.stat().st_size > LIMIT_BYTES:
            yield f"{path.name} is larger than {LIMIT_BYTES // 10**6} MB"
        platforms = {tag.platform for tag in tags}
        fitting = [
            wheel
            for wheel, pattern in missing.items()
            if wheel.startswith(f"{name} ") and any(re.fullmatch(pattern, p) for p in platforms)
        ]
        if not fitting:
            yield f"{path.name} is for no further system of the release"
        for wheel in fitting:
            del missing[wheel]
        if name == APP:
            yield from _link_problems(path)
    yield from (f"there is no wheel of {wheel}" for wheel in missing)


def _link_problems(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode("utf-8")
    if links := relative_links(text):
        example = f"{len(links)} relative links, such as {links[0]}"
        yield f"the description in {wheel.name} has {example} (run tests/absolute_links.py)"


def _one(pattern: str, path: Path) -> str:
    found = re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if len(found) != 1:
        raise SystemExit(f"{path} must contain exactly one line of the form {pattern}")
    return str(found[0])


def main() -> None:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    wheels = Path(sys.argv[2]) if len(sys.argv) == 3 else None
    found = list(problems(ROOT, sys.argv[1], wheels))
    print("\n".join(found) or f"{sys.argv[1]} can be released")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
