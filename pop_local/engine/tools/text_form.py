"""Tool calls as plain text, for templates and models that support no other format."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from pop_local.engine.chat_messages import Message
from pop_local.engine.decode.text import n_begun
from pop_local.engine.tools.native import Parsed
from pop_local.engine.tools.tool import Tool

_SYSTEM_PROMPT = """# Tools

You may call these functions. Each line describes a function, with the JSON schema of its arguments:
<tools>
{tools}
</tools>

To call a function, write nothing but its name and arguments as JSON between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
The next message contains the result. Answer without a call if no function is useful."""
_CALL = "<tool_call>"
_SPACE = r"/[ \n]{0,4}/"
_END = r"/\}?\s{0,4}(<\/[a-z_]{1,16}>\s{0,4})?(```)?/"
# A call starts after a tag, or at the start of an answer, where a fence and any tag may precede it.
# Qwen2.5's template shows calls in double braces, so Qwen2.5 models write two braces.
_OPEN = r"(?:<tool_call>\s*|\A\s*(?:```\w*\s*)?(?:<(?!think)[a-z_]{1,16}>\s*)?)"
_CLOSE = re.compile(r"\s*\}{1,2}\s*(?:</[a-z_]{1,16}>\s*)?(?:```\s*)?")
_CLOSING = re.compile(r"\s*\}{0,2}\s*(?:<[/a-z_]{0,17}>?)?\s*`{0,3}\s*")  # an incomplete _CLOSE
_BEGUN = re.compile(
    r'\s*(?:`{0,3}|```\w*\s*)(?:<(?:[a-z_]{1,16}>?)?\s*)?(?:\{{1,2}\s*(?:"\w{0,4}|"name".{0,200})?)?',
    re.DOTALL,
)


def with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Convert tools, calls, and results to plain text, which any template can render."""
    listed = "\n".join(json.dumps(tool.openai["function"], ensure_ascii=False) for tool in tools)
    output: list[Message] = []
    for message in messages:
        content = message.content
        if message.role == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            last = output[-1] if output else None
            if last is not None and last.call_id:
                output[-1] = replace(last, content=f"{last.content}\n{result}")
            else:
                output.append(Message("user", result, message.pictures, call_id=message.call_id))
        else:
            calls = (
                f'{_CALL}\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n'
                "</tool_call>"
                for call in message.calls
            )
            text = "\n".join([content] * bool(content) + [*calls])
            output.append(replace(message, content=text, calls=()))
    if not tools:
        return output
    system = _SYSTEM_PROMPT.format(tools=listed)
    if output and output[0].role == "system":
        return [replace(output[0], content=f"{output[0].content}\n\n{system}"), *output[1:]]
    return [Message("system", system), *output]


def lark(rules: Sequence[tuple[Tool, str]], *, several: bool) -> str:
    """Return a grammar for tool calls in <tool_call> tags. `rules`: tools and their Lark rules."""
    calls = " | ".join(f"call{number}" for number in range(len(rules)))
    more = f"({_SPACE} call)*" if several else ""
    lines = [f"start: call {more}", f'call: "{_CALL}" {_SPACE} ({calls}) {_SPACE} "</tool_call>"']
    for number, (tool, rule) in enumerate(rules):
        named = json.dumps(f'"name": {json.dumps(tool.name)}, "arguments": ')
        lines += [f'call{number}: "{{" {named} args{number} "}}"', f"args{number}: {rule}"]
    return "\n".join(lines)


def rest_of_json(rule: str) -> str:
    """Return a grammar for the rest of a call, after the text that `opening` matches."""
    return f'start: {_SPACE} args {_SPACE} "}}" {_END}\nargs: {rule}'


def opening(names: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches the start of a call, up to the arguments (group `rest`)."""
    either = "|".join(map(re.escape, names))
    return re.compile(
        rf'{_OPEN}\{{{{1,2}}\s*"name"\s*:\s*"(?P<name>{either})"\s*,\s*'
        r'"(?:arguments|parameters)"\s*:\s*(?P<rest>)'
    )


def may_open(text: str) -> bool:
    """Return True if an answer that starts with `text` could become a JSON call."""
    return _BEGUN.fullmatch(text) is not None


def parse(text: str, names: Sequence[str], *, partial: bool) -> Parsed:
    """Parse a complete or partial answer. Calls to unknown functions are kept as content."""
    content, calls, at = "", list[tuple[str, str]](), 0
    opens = opening(names)
    while match := opens.search(text, at):
        name, end = match["name"], match.end()
        content += text[at : match.start()]
        try:
            _, at = json.JSONDecoder().raw_decode(text, end)
        except (RecursionError, ValueError):  # incomplete arguments
            calls.append((name, "" if partial else text[end:]))
            return Parsed(content, "", tuple(calls))
        calls.append((name, text[end:at]))
        closed = _CLOSE.match(text, at)
        at = closed.end() if closed else at
    rest = text[at:]
    content += "" if calls and _CLOSING.fullmatch(rest) else rest
    if partial:
        # Hold back text that may be the start of a call.
        tagged = content.find(_CALL)
        content = content[: tagged if tagged >= 0 else len(content) - n_begun(content, _CALL)]
    return Parsed(content.rstrip() if calls else content, "", tuple(calls))
