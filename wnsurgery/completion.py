"""What a shell needs to complete the command: click's scripts, which ask the command itself at each press of Tab."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

__all__ = ["SHELLS", "script"]

SHELLS = ("bash", "zsh", "fish")


def script(command: click.Command, shell: str) -> str:
    """The script for a shell, to be read at its start."""
    kind = get_completion_class(shell)
    assert kind is not None
    # not that of bash's own class, which runs whatever bash is here to ask for its version
    return ShellComplete.source(kind(command, {}, "wnsurgery", "_WNSURGERY_COMPLETE"))
