"""Chat templates: equal to llama_cpp's results, with limits on time and memory."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from pop_base.errors import PopError
from pop_local.calibration.activations import loaded
from pop_local.engine.chat_messages import Message
from pop_local.engine.images.pictures import picture_of
from pop_local.engine.prompt import templates
from pop_local.engine.prompt.prompter import _without_system
from pop_local.engine.prompt.templates import Template
from support.calls import opened
from support.child_limits import call_limit
from support.synthetic import make_gguf
from support.vision_models import png

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße </s> & <b>"},
    {"role": "assistant", "content": ""},
]
FAIR = [
    "{% for m in messages %}\n  {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    "{{ bos_token }}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
    "{{ m.role | upper }}{{ eos_token }}{% endfor %}",
    "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}"
    "{% endfor %}{{ ns.n }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}{{ tools is none }}",
]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WILD = {
    ENDLESS: "more than 1 s",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% endfor %}{{ ns.a }}": "more than",
    "{{ '%2000000000d' % 1 }}": "MemoryError",
    "{{ 'a' | center(2000000000) }}": "MemoryError",
    "{{ messages[0].content * 14000000 }}": "70,000,000 characters",
    "{{ 1/0 }}": "ZeroDivisionError",
    "{{ 'x'.y.z }}": "UndefinedError",
    "{% if": "TemplateSyntaxError",
    "x" * (templates.MAX_TEMPLATE_CHARACTERS + 1): "1,048,577 characters",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{ raise_exception('no system prompt') }}": "no system prompt",
}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = make_gguf(tmp_path_factory.mktemp("vocab") / "model.gguf", "llama")
    with loaded(path, n_threads=1) as context:
        yield context.vocabulary.pointer


@pytest.mark.parametrize("template", FAIR)
def test_prompt_equals_llama_cpps(template, vocab):
    ours = Template(template, vocab)
    theirs = Jinja2ChatFormatter(template, ours.eos, ours.bos)
    assert ours.render(MESSAGES) == theirs(messages=MESSAGES).prompt != ""  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def in_a_hurry():
    with call_limit(1.0, templates.renderer):
        yield


@pytest.mark.parametrize("template", WILD, ids=lambda template: template[:30])
def test_endless_template_fails_only_for_its_model(in_a_hurry, tmp_path, template, vocab):
    path = make_gguf(tmp_path / "wild.gguf", "llama", chat_template=template)
    with pytest.raises(PopError, match=f"chat template .*{WILD[template]}"):
        opened(path, n_ctx=128).chat("hello")
    assert "Be brief." in Template(FAIR[0], vocab).render(MESSAGES)


@pytest.mark.parametrize("of_system", ["{{ raise_exception('no system') }}", "{% continue %}"])
def test_user_message_contains_system_prompt_without_system_role(tmp_path, of_system):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + of_system + "{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    path = make_gguf(tmp_path / "plain.gguf", "llama", chat_template=template)
    with opened(path, n_ctx=256) as model:
        conversation = model.engine.prompter.conversation
        for lines, equivalent in (
            (["system A", "user B", "assistant C"], ["user A\nB", "assistant C"]),
            (["system A", "assistant B", "system C", "user D"], ["assistant B", "user A\nC\nD"]),
            (["system A"], ["user A"]),
        ):
            messages, expected = ([*map(message, texts)] for texts in (lines, equivalent))
            assert conversation(messages).tokens == conversation(expected).tokens


def message(line: str) -> Message:
    role, content = line.split(" ")
    return Message(role, content)  # type: ignore[arg-type]


def test_images_follow_system_prompt_with_their_text():
    picture = picture_of(png(3, 32, 32), "a.png")
    messages = [Message("system", "ab"), Message("user", "cd", ((0, picture), (2, picture)))]
    [joined] = _without_system(messages)
    assert joined.content == "ab\ncd"
    assert [offset for offset, _ in joined.pictures] == [3, 5]


def test_next_render_ignores_interrupted_result(vocab):
    template = Template("{{ messages[0].content }}", vocab)
    endless = Template(ENDLESS, vocab)
    press = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    press.start()
    with pytest.raises(KeyboardInterrupt):
        endless.render(MESSAGES)
    press.join()
    assert template.render([{"role": "user", "content": "three"}]) == "three"


def test_script_without_a_guard_runs_once(tmp_path):
    (tmp_path / "script.py").write_text(
        "from pop_local.engine.prompt.templates import renderer\n"
        "print('started')\n"
        "print(renderer.call('rendered', '{{ 1 + 1 }}', {}))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["started", "2"]
