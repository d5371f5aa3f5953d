"""The command line: one file per verb, imported when asked for; torch only when a verb runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cachefold import __version__
from cachefold.core.names import closest

VERBS = (
    "retrofit",
    "calibrate",
    "reproduce",
    "card",
    "import-megatron",
    "generate",
    "explain",
    "eval",
    "bench",
    "demo",
    "ls",
    "env",
)
"""Verbs in the order of the help; each is the function `run` of the module of this package that
is named like it, with _ for -."""


class LazyGroup(TyperGroup):
    """Imports a verb when it is asked for and prints what a user can mend as one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Builds one verb; None when there is no such verb."""
        if cmd_name not in VERBS:
            return None
        if cmd_name not in self.commands:
            module = importlib.import_module(f"cachefold.cli.{cmd_name.replace('-', '_')}")
            verb = typer.Typer(add_completion=False, rich_markup_mode=None)
            verb.command(cmd_name)(module.run)
            self.commands[cmd_name] = typer.main.get_command(verb)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the verb.

        Raises:
            ValueError: no such verb.
        """
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise ValueError(
                f"unknown verb {args[0]!r}.{closest(args[0], VERBS)} Verbs: {', '.join(VERBS)}."
            )
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Runs; what a user can mend ends with exit code 2 and no traceback.

        That is a ValueError of the library, or an OSError that names a file.
        """
        try:
            return super().main(args, *rest, **extra)
        except ValueError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)


app = typer.Typer(
    cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A KV cache that folds itself: train, run and inspect folded models."""


def main() -> None:
    """Entry point of `cachefold`."""
    app(prog_name="cachefold")
