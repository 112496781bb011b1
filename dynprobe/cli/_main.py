"""Entry point: run the app, turn every error made on purpose into one message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["main"]

_INTERRUPTED = "interrupted; the same command continues"
_NO_ROOM = (
    "memory ran out. Take less at once (--limit, --batch-size, shorter prompts), or type --dtype bfloat16, "
    "--device-map auto or --device cpu where the command has them; finished batches are kept"
)


def main(arguments: list[str] | None = None) -> int:
    """Run ``dynprobe`` and return its exit code: 0 done, 1 failed, 2 usage, 3 refused by a self-test, 130 interrupted.

    Args:
        arguments: Words after the program's name; default those of the process.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        dynprobe ...
        0
    """
    import warnings

    with warnings.catch_warnings():  # which also puts the way they are shown back
        warnings.showwarning = _warn
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        with _terminable():
            return _command(arguments)
    except KeyboardInterrupt:  # also while libraries are imported, before there is a command to stop
        return _say(_INTERRUPTED, 130)


@contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM, by which a scheduler or a shutdown ends a job, for Ctrl-C: what is finished is recorded as such.

    A handler of a program that calls :func:`main` stays; a second signal is an interrupt of its own and ends at once.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _command(arguments: list[str] | None) -> int:
    import typer

    from dynprobe._command_line import COMMAND_LINE
    from dynprobe.cli._app import app
    from dynprobe.errors import DynprobeError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = sys.argv[1:] if arguments is None else arguments
    typed = COMMAND_LINE.set(("dynprobe", *map(str, words)))
    try:
        code = app(args=words, prog_name="dynprobe", standalone_mode=False)
    except typer.Abort:
        return _say(_INTERRUPTED, 130)
    except DynprobeError as error:
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output left (`| head`); a second write at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return _say(f"{error.strerror}: {error.filename or 'while writing'}; choose another folder with --out", 1)
        raise
    except Exception as error:
        if _memory_ran_out(error):
            return _say(f"{_NO_ROOM} ({str(error).splitlines()[0][:200] if str(error) else 'MemoryError'})", 1)
        # typer carries its own copy of click and does not export the base class of usage errors.
        if not any(base.__name__ == "ClickException" for base in type(error).__mro__):
            raise
        return _usage(error)
    finally:
        COMMAND_LINE.reset(typed)
    # typer makes an exit code of a Ctrl-C that no command caught, and says nothing.
    return _say(_INTERRUPTED, 130) if code == 130 else int(code or 0)


def _memory_ran_out(error: Exception) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dynprobe.probes._chunks import out_of_memory

    return out_of_memory(error)


def _usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())  # noqa: T201 - help goes to standard output
        return 0
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f"  (see: {context.command_path} --help)"
    return _say(f"{_message(error, context)}{_elsewhere(error, context)}{hint}", 2)


def _message(error: Any, context: Any) -> str:
    """What went wrong, with the nearest option where there is none of that name."""
    name = getattr(error, "option_name", None)
    if type(error).__name__ != "NoSuchOption" or context is None:
        return str(error.format_message())
    from dynprobe.errors import did_you_mean

    return f"No such option: {name}.{did_you_mean(str(name), [o for p in context.command.params for o in p.opts])}"


def _elsewhere(error: Any, context: Any) -> str:
    """Name the commands that have the option that this one lacks."""
    name = getattr(error, "option_name", None)
    if name is None or context is None or type(error).__name__ != "NoSuchOption":
        return ""
    commands = getattr(context.find_root().command, "commands", {})
    having = [word for word, command in commands.items() if any(name in option.opts for option in command.params)]
    return f" Commands that have it: {', '.join(having)}" if having else ""


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show a warning: our own as a message, others with the line that they come from."""
    own = issubclass(category, UserWarning) and f"{os.sep}dynprobe{os.sep}" in filename
    text = f"dynprobe: warning: {message}" if own else f"{filename}:{lineno}: {category.__name__}: {message}"
    print(text, file=file or sys.stderr)


def _say(message: str, code: int) -> int:
    print(f"dynprobe: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
