"""How the command ends: warnings and errors as one line on stderr, each kind of error with its exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import traceback
from typing import NoReturn

import click

from wnsurgery.errors import WnsurgeryError
from wnsurgery.report import discard, escape, quiet, say, verbose

__all__ = ["leave"]

_REFUSALS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # of the system, at the mere look at an input


def leave(command: click.Command, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code, whatever happens."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    _leave_on_signals()
    _fill_in_stderr()
    _show_warnings()
    _spell_out_what_cannot_be_written()
    sys.exit(_run(command, arguments, debug))


def _leave_on_signals() -> None:
    """What asks a process to end lets it put its files in order first; a hang-up that `nohup` ignores stays ignored."""
    for name in ("SIGTERM", "SIGHUP", "SIGXCPU"):
        number = getattr(signal, name, None)  # not every system has all three
        if number is not None and (name == "SIGTERM" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def _fill_in_stderr() -> None:
    """Where stderr was closed before the start, messages go nowhere, rather than into the next file that is opened."""
    if sys.stderr is None:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _show_warnings() -> None:
    """What the library logs as a warning, as a line on stderr."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not quiet() and (record.levelno >= logging.WARNING or verbose()):
                say(f"wnsurgery: {record.levelname.lower()}: {escape(record.getMessage())}")

    logger = logging.getLogger("wnsurgery")
    logger.setLevel(logging.INFO)
    if not any(type(handler).__name__ == "Lines" for handler in logger.handlers):
        logger.addHandler(Lines(logging.INFO))


def _spell_out_what_cannot_be_written() -> None:
    """A name from a file, or a sign of ours, that the terminal's encoding lacks is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in (stream.encoding or "").lower():
            stream.reconfigure(errors="backslashreplace")


def _run(command: click.Command, arguments: list[str] | None, debug: bool) -> int:
    if sys.stdout is None:  # closed before the start
        return _fail("stdout: closed", None, 5, debug)
    try:
        command.main(args=arguments, prog_name="wnsurgery", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # of click from 8.2 on; before, it ends as --help does
            say(error.message)
            return 2
        return _fail(error.format_message(), None, 2, debug)
    except WnsurgeryError as error:
        return _fail(error.message, error.hint, error.exit_code, debug)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except SystemExit as stop:
        if stop.code != 1:  # that is what click makes of a closed pipe; nothing of ours raises it
            raise
        discard(sys.stdout)
        return 141
    except OSError as error:
        if error.filename is not None and error.errno in _REFUSALS:
            return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}", None, 3, debug)
        if not _is_stdout(error):
            return _bug(error, debug)
        discard(sys.stdout)
        return 141 if _is_closed(error) else _fail(f"stdout: {error.strerror}", None, 5, debug)
    except Exception as error:
        return _bug(error, debug)
    return 0


def _bug(error: Exception, debug: bool) -> int:
    message = f"internal error: {type(error).__name__}: {error}"
    return _fail(message, "this is a bug of wnsurgery; run again with --debug and report it", 1, debug)


def _is_closed(error: BaseException | None) -> bool:
    """Whether whoever read our output has gone."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EINVAL)


def _is_stdout(error: OSError) -> bool:
    """Whether an error came from writing results: files are written under names, and say so."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.EINVAL, errno.ENOSPC, errno.EIO, errno.EBADF)


def _fail(message: str, hint: str | None, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    say(f"wnsurgery: error: {escape(message)}")
    if hint:
        say(f"hint: {escape(hint)}")
    return code
