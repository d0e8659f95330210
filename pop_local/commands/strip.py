"""`pop-local strip IN.pop.gguf [OUT.gguf]`: restore the original file."""

from pathlib import Path
from typing import Annotated

import typer

from pop_converter.base.errors import FormatError
from pop_converter.base.numbers import size
from pop_converter.gguf.header import read_header
from pop_converter.gguf.source import is_sidecar
from pop_converter.popfile import rewrite
from pop_converter.popfile.format import pop_meta
from pop_local.commands.shared_options import Force, Json, Output, one_output
from pop_local.models.model_names import resolve
from pop_local.ui.tables import print_facts, print_json
from pop_local.ui.watch import terminal_watch
from pop_local.workflows.events import Unit


def strip(
    model: Annotated[str, typer.Argument(metavar="IN.gguf", help="A converted model.")],
    output: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT.gguf",
            help="Output file (default: the original file's name, in IN.gguf's folder).",
        ),
    ] = None,
    out: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Restore the original file from a converted copy, byte for byte, and check its hash.

    A model that was split into several files is restored as one file.
    """
    output = one_output(output, out)
    path = resolve(model)
    header = read_header(path)
    if is_sidecar(header):
        raise FormatError(
            f"{path} is a sidecar, so there is nothing to strip",
            "delete the sidecar; the model file is unchanged",
        )
    found = pop_meta(header)
    # The stored name is untrusted, so its folder is ignored.
    name = Path(found.source_name).name if found else ""
    target = output or path.with_name(name or f"{path.name.removesuffix('.gguf')}.stripped.gguf")
    with terminal_watch() as watch:
        advance = watch.stage("Restoring", Unit.BYTES)
        meta = rewrite.strip(path, target, progress=advance, force=force)
    n_bytes, sha256 = target.stat().st_size, meta.source_sha256
    if json:
        print_json({"source": path, "output": target, "output_bytes": n_bytes, "sha256": sha256})
    else:
        unchanged = f"{sha256} (matches the original's hash)"
        print_facts([("Written", str(target)), ("Size", size(n_bytes)), ("sha256", unchanged)])
