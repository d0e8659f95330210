"""Hints for errors that name the command line's options and commands.

The library's own hints are for Python callers.
"""

import errno

from pop_converter.base.errors import PopError

# By cause. Names in braces are the error's fields; {hint} is the library's hint.
BY_CAUSE = {
    "activations-not-shown": "reinstall the backend, or convert with --projection own",
    "analyze-converted": "analyze the original model, which pop-local strip {path} restores",
    "bench-context": "remove --ctx, or use shorter prompts (--prompt)",
    "bench-trained": "use shorter prompts (--prompt)",
    "cannot-learn": "disable it: --learn off",
    "cannot-resume": "move it away or remove --resume to start over",
    "context-full": "use a larger context (--ctx {n_ctx}) or a shorter prompt",
    "context-too-short": "use --context {n_least} or more",
    "context-too-small": "use a larger one: --ctx {n_ctx}",
    "converted-already": "restore the original first: pop-local strip",
    "copying-broken": (
        "skip fewer layers, search with `--quality fast` instead, or write it anyway (--force)"
    ),
    "documents-too-short": "{hint}",
    "download-exists": "move it away, replace it (--force), or use another folder (--dir)",
    "download-is-folder": "move it away or use another folder (--dir)",
    "fit-not-measurable": "lower --sink and --tail, or leave out the fit (--projection own)",
    "foreign-sidecar": "create one for this model: pop-local convert --sidecar {model}",
    "is-remote": "run `pop-local pull {model}` and use the path that it prints",
    "model-replaced": "restart, and replace models in use with a rename (mv) instead of cp",
    "missing-torch": "install it with: pip install 'pop-local[analyze]'",
    "no-memory-for-fit": "lower --tokens, close other programs, or skip the fit: --no-fit",
    "no-memory-for-gates": (
        "lower --context and --continuation, close other programs, or skip the gates: --no-gates"
    ),
    "no-memory-to-distill": "close other programs or remove --distill",
    "no-mmproj": (
        "use the mmproj published with the model: --mmproj FILE. In a chat, /undo and /clear remove"
        " pictures"
    ),
    "no-room-for-tensors": "rewrite it with llama-quantize (type COPY), or use --projection own",
    "no-sidecar": "create one: pop-local convert --sidecar MODEL.gguf",
    "no-space-for-download": "free some space, or use another folder (--dir or ${variable})",
    "not-a-sidecar": "create one: pop-local convert --sidecar MODEL",
    "not-converted": "convert it first: pop-local convert {model}",
    "not-distilled": "remove --distill",
    "not-fetched": "run `pop-local pull {model}`",
    "not-finite": "the model file may be damaged; check whether it answers (pop-local run)",
    "nothing-to-compare": "convert it (pop-local convert {model}) or choose a --boundary",
    "nothing-to-evaluate": ("convert it (pop-local convert {model}) or use --skip or --boundary"),
    "one-sequence": "use --parallel 1",
    "output-exists": "use another name, or replace it: --force",
    "outside-budget": "`pop-local convert` without --skip and --boundary finds the deepest allowed",
    "over-budget": (
        "allow more loss (--quality fast, --max-kl, --max-ppl-ratio, --max-copy-ratio), or use"
        " --skip or --boundary without a limit"
    ),
    "projections-for-one-boundary": (
        "measure other boundaries on the original model, {model}, with or without --fit"
    ),
    "no-fit": "use --projection own with convert, no --fit with eval",
    "prompts-too-short": "use longer prompts: --prompt {n_least} or more",
    "rpc-unreachable": "start the same version there: pop-local rpc-server --host ...",
    "sidecar-alone": "name the model: pop-local inspect MODEL --sidecar {sidecar} --verify",
    "sidecar-as-model": "give the model ({model}) and --sidecar",
    "sidecar-for-converted": "remove --sidecar, or use the original file",
    "singular": "fit on more varied text",
    "text-too-short": "use a longer text (--text), fewer windows or a shorter --context",
    "too-few-tokens": "use --tokens {n_least} or more (default: {n_default})",
    "unknown-model": "{hint}; `pop-local list` shows local models, `pop-local pull` the catalog",
    "unreadable-tensor": "convert with --projection own, or use another quantisation",
    "windows-too-long": (
        "give shorter windows (--context, --continuation), or no look-ups (--lookups 0)"
    ),
}

# Commands and options of Ollama, llm and llama.cpp, with their equivalents.
FOREIGN_COMMANDS = {
    "cp": "copy the model's file, which `pop-local list --json` names",
    "create": "`pop-local convert MODEL` creates a model",
    "help": "`pop-local --help` lists the commands, `pop-local COMMAND --help` explains one",
    "ls": "`pop-local list` lists the models",
    "models": "`pop-local list` lists the models",
    "prompt": "`pop-local run MODEL QUESTION` asks one question",
    "ps": "a model stays loaded only while `chat` or `serve` runs",
    "quantize": "use llama-quantize of llama.cpp; `pop-local convert` adds pruning",
    "show": "`pop-local inspect MODEL` shows a model's contents",
    "stop": "a model stays loaded only while `chat` or `serve` runs; Ctrl-C stops them",
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

TRACE = "`pop-local --debug COMMAND ...` shows the traceback"
GAVE_UP = "the model file may be damaged; download it again or use another model"
LOST_SERVER = "restart it (pop-local rpc-server); `chat` offers to continue the conversation"
MEMORY = "close other programs, or use a smaller model or context (--ctx)"
_SPACE = "free some space, or write to another disk"
_PERMISSION = "check the permissions of the file and of its folder"
_BY_ERRNO = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "this disk is read-only; use another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "give a file instead of a folder",
    errno.ENOMEM: MEMORY,
}


def hint_of(error: PopError) -> str:
    """Return the hint to show (default: the library's), which may be empty."""
    words = BY_CAUSE.get(error.cause, "{hint}")
    return words.format_map({**error.fields, "hint": error.hint})


def os_hint(error: OSError) -> str:
    return _BY_ERRNO.get(error.errno or 0, TRACE)
