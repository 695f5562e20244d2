"""The application that the verbs belong to."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="What did this tuning change inside my language model, and how sure are we?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
