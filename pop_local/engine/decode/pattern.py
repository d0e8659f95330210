"""Patterns of JSON schemas, written as llama_cpp's converter reads them.

It knows no classes such as \\d and takes no \\., and what it lets through may end a JSON string.
"""

import re

_UNIT = re.compile(
    r"\\(?P<escaped>.?)"
    r"|\[(?P<negated>\^?)(?P<members>(?:\\.|[^\]\\])+)\]"
    r"|(?P<opened>\(\?:)"
    # GBNF takes a second quantifier, as of +?, for another repetition.
    r'|(?P<refused>[\^$"\x00-\x1f]|\(\?|[*+?}][*+?{])',
    re.DOTALL,
)
_MEMBER = re.compile(r"(\\?.)(?:-(\\?.))?", re.DOTALL)
_Ranges = list[tuple[int, int]]
_CLASSES: dict[str, _Ranges] = {
    r"\d": [(0x30, 0x39)],
    r"\w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    r"\s": [(0x20, 0x20)],
}
# All but " and \ and control characters, which JSON escapes.
_PLAIN: _Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)]
_ESCAPED: _Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]


def readable(pattern: str) -> str:
    """Return a pattern of the strings that need no escape in JSON.

    Raises ValueError for one that is not anchored at both ends, and for what is not supported.
    """
    if len(pattern) < 2 or pattern[0] != "^" or pattern[-1] != "$":
        raise ValueError(f"the pattern {pattern} does not begin with ^ and end with $")
    return f"^({_UNIT.sub(_rewritten, pattern[1:-1])})$"


def _rewritten(unit: re.Match[str]) -> str:
    if unit["opened"]:
        return "("
    if unit["refused"]:
        raise ValueError(f"{unit[0]} within a pattern is not supported")
    if unit["members"]:
        several = _MEMBER.findall(unit["members"])
        ranges = [one for first, last in several for one in _ranges(first, last)]
        return _class(ranges, bool(unit["negated"]))
    is_negated = unit[0].lower() in _CLASSES and unit[0].isupper()
    return _class(_ranges(unit[0].lower() if is_negated else unit[0]), is_negated)


def _ranges(first: str, last: str = "") -> _Ranges:
    """Those of a class's member: a character, escaped or not, a range of them, or a class."""
    if first in _CLASSES and not last:
        return _CLASSES[first]
    return [(_code(first), _code(last or first))]


def _code(member: str) -> int:
    if member == "\\" or (len(member) > 1 and member[1].isalnum()):
        raise ValueError(f"{member} in a pattern is not supported")
    return ord(member[-1])


def _class(ranges: _Ranges, is_negated: bool) -> str:
    found = [*ranges, *_ESCAPED]
    if not is_negated:
        found = [(max(a, c), min(b, d)) for a, b in ranges for c, d in _PLAIN]
        found = [(low, high) for low, high in found if low <= high]
    if not found:
        raise ValueError("a pattern asks for what JSON escapes")
    members = "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in found)
    return f"[{'^' if is_negated else ''}{members}]"
