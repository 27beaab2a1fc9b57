"""`convert`: a foreign or pickled checkpoint becomes an adapter's folder."""

from pathlib import Path
from typing import Annotated

import typer

from prefix_service.cli.console import print_json, say
from prefix_service.cli.options import BaseConfig, Config, Json


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file or a folder.", exists=True)],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the adapter goes.")],
    config: Config = None,
    base_config: BaseConfig = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Open a pickle that may run code. Know who wrote it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a foreign or pickled checkpoint into an adapter folder.

    It is opened on this machine, by the strictest loader that can read it. The folder holds safetensors, which run no
    code.
    """
    from prefix_service.checkpoints.convert import convert as run
    from prefix_service.checkpoints.convert import write
    from prefix_service.prefix.layouts import shown_names

    conversion = run(source, config=config, base_config=base_config, unsafe=unsafe)
    write(conversion, output)
    if as_json:
        shown = ("opened", "found", "config", "left_out")
        print_json({name: getattr(conversion, name) for name in shown})
        return
    for line in (f"opened {source} with {conversion.opened}", f"found {conversion.found}"):
        say(line)
    if left_out := conversion.left_out:
        say(f"left out {len(left_out)}, not part of the prefix: {shown_names(left_out)}")
    say(f"wrote {output}")
