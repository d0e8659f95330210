"""Remedies for errors, in the words of the command line.

The library says what to do in Python's terms; here its causes get hints that name options and
commands.
"""

import errno

from pop_converter.base.errors import PopError

# By cause; the names in braces are the error's fields, and {hint} is what the library says.
BY_CAUSE = {
    "activations-not-shown": "reinstall the backend, or convert with --projection own",
    "analyze-converted": "analyze the model it was made of; pop-local strip {path} gives it back",
    "bench-context": "leave --ctx out, or give shorter prompts (--prompt)",
    "bench-trained": "give shorter prompts (--prompt)",
    "cannot-learn": "leave it out: --learn off",
    "cannot-resume": "move it away, or leave out --resume, to start afresh",
    "context-full": "give a larger context (--ctx {n_ctx}) or a shorter prompt",
    "context-too-short": "give a longer context: --context {n_least} or more",
    "context-too-small": "open the model with a larger one: --ctx {n_ctx}",
    "converted-already": "get the original back first: pop-local strip",
    "copying-broken": (
        "skip fewer layers, search with `--quality fast` instead, or write it anyway (--force)"
    ),
    "download-exists": "move it away, replace it (--force), or choose another folder (--dir)",
    "download-is-folder": "move it away, or choose another folder (--dir)",
    "fit-not-measurable": "lower --sink and --tail, or leave out the fit (--projection own)",
    "foreign-sidecar": "make one for this model: pop-local convert --sidecar {model}",
    "is-remote": "run `pop-local pull {model}` and give the file that it prints",
    "model-replaced": "start again; and replace a model in use by a rename (mv), not by cp",
    "missing-torch": "install it with: pip install 'pop-local[analyze]'",
    "no-memory-for-fit": "lower --tokens, close other programs, or leave it out: --no-fit",
    "no-memory-for-gates": (
        "lower --context and --continuation, close other programs, or leave them out: --no-gates"
    ),
    "no-memory-to-distill": "close other programs, or leave out --distill",
    "no-mmproj": (
        "give the mmproj that was published with it: --mmproj FILE; in a chat /undo and /clear drop"
        " what it cannot see"
    ),
    "no-room-for-tensors": "write it anew with llama-quantize (type COPY), or use --projection own",
    "no-sidecar": "make one: pop-local convert --sidecar MODEL.gguf",
    "no-space-for-download": "free some space, or choose another folder (--dir, or ${variable})",
    "not-a-sidecar": "make one: pop-local convert --sidecar MODEL",
    "not-converted": "convert it first: pop-local convert {model}",
    "not-distilled": "leave out --distill",
    "not-fetched": "run `pop-local pull {model}`",
    "not-finite": "the model's file may be damaged: try whether it answers (pop-local run)",
    "nothing-to-compare": "convert it (pop-local convert {model}), or choose a --boundary",
    "nothing-to-evaluate": (
        "convert it (pop-local convert {model}), or choose --skip or --boundary"
    ),
    "one-sequence": "take --parallel 1",
    "output-exists": "choose another name, or replace it: --force",
    "outside-budget": "`pop-local convert` without --skip and --boundary finds the deepest inside",
    "over-budget": (
        "allow more (--quality fast, --max-kl, --max-ppl-ratio, --max-copy-ratio), or choose --skip"
        " or --boundary without a limit"
    ),
    "projections-for-one-boundary": (
        "measure other boundaries on the model itself, {model}, with --fit or without"
    ),
    "no-fit": "leave the layers their own: --projection own of convert, no --fit of eval",
    "prompts-too-short": "give longer prompts: --prompt {n_least} or more",
    "rpc-unreachable": "start it there, from the same version: pop-local rpc-server --host ...",
    "sidecar-alone": "say where it is: pop-local inspect MODEL --sidecar {sidecar} --verify",
    "sidecar-as-model": "give the model itself ({model}), and --sidecar",
    "sidecar-for-converted": "leave out --sidecar, or give the file that it was converted from",
    "singular": "fit on more varied text",
    "text-too-short": "give a longer text (--text), fewer windows, or shorter ones (--context)",
    "too-few-tokens": "give --tokens {n_least} or more; the default is {n_default}",
    "unknown-model": "{hint}; `pop-local list` shows what is here, `pop-local pull` what is known",
    "unreadable-tensor": "convert with --projection own, or take another quantisation",
    "windows-too-long": (
        "give shorter windows (--context, --continuation), or no look-ups (--lookups 0)"
    ),
}

# Words of Ollama, llm and llama.cpp, and what does the same here.
FOREIGN_COMMANDS = {
    "cp": "a model is a file, which `pop-local list --json` names: copy that",
    "create": "`pop-local convert MODEL` makes a model",
    "help": "`pop-local --help` shows the commands, `pop-local COMMAND --help` one",
    "ls": "`pop-local list` shows the models",
    "models": "`pop-local list` shows the models",
    "prompt": "`pop-local run MODEL QUESTION` asks one question",
    "ps": "a model stays loaded only while `chat` or `serve` runs",
    "quantize": "llama-quantize of llama.cpp does that; `pop-local convert` adds the pruning",
    "show": "`pop-local inspect MODEL` shows what is in a model",
    "stop": "a model stays loaded only while `chat` or `serve` runs: Ctrl-C ends them",
}
FOREIGN_OPTIONS = {
    "-c": "use --ctx N",
    "--n-predict": "use --max-tokens N",
    "--num-predict": "use --max-tokens N",
    "--temp": "use --temperature T",
    "-m": "give the model without an option, as the first argument",
    "-n": "use --max-tokens N",
    "-ngl": "use --gpu-layers N",
    "-p": "give the question without an option, after the model",
    "-t": "use --threads N",
}

TRACE = "`pop-local --debug COMMAND ...` shows where it happened"
GAVE_UP = "the model's file may be damaged: download it again, or take another"
LOST_SERVER = "start it again (pop-local rpc-server); `chat` offers to go on where it ended"
MEMORY = "close other programs, or take a smaller model or context (--ctx)"
_SPACE = "free some space, or write to another disk"
_PERMISSION = "check the permissions of the file and of its folder"
_BY_ERRNO = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "that disk is read-only: choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.EISDIR: "that is a folder: give a file",
    errno.ENOMEM: MEMORY,
}


def hint_of(error: PopError) -> str:
    """The hint to show; the library's own where the command line knows no better. May be empty."""
    words = BY_CAUSE.get(error.cause, "{hint}")
    return words.format_map({**error.fields, "hint": error.hint})


def os_hint(error: OSError) -> str:
    return _BY_ERRNO.get(error.errno or 0, TRACE)
