"""The process of the command `infermill`, also `python -m infermill`: its first worker, its Ctrl-C, and its end.

A job's first worker is started before the command line is read, since the libraries that read it take a third of a
second: it imports its own meanwhile.
"""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from threading import Thread

from infermill.imports import leave_out

JOBS = ("run", "retry")
OTHER_WORKERS = ("--engine", "--runtime", "--help", "-h")
"Options that ask for a worker of another kind, or for none."
INTERRUPTED = 130
_POLL_SECONDS = 0.1


def main() -> None:
    """Run the command line, and exit with its code; 130 where it is stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    leave_out()
    codes = [1]  # what an unforeseen exception, whose traceback has been printed, leaves
    # Not in the main thread: that must be free to see Ctrl-C while a store or the network holds the command.
    command = Thread(target=lambda: codes.insert(0, _run_command()), name="command", daemon=True)
    try:
        command.start()
        while command.is_alive():
            command.join(_POLL_SECONDS)  # a signal may reach another thread, which does not wake this one
    except KeyboardInterrupt:
        _stop()
    sys.exit(codes[0])


def _run_command() -> int:
    command, options = sys.argv[1:2], sys.argv[2:]
    if command and command[0] in JOBS and not any(option.startswith(OTHER_WORKERS) for option in options):
        from infermill.engines.local import start_early

        start_early()
    from infermill.cli import run_command

    return run_command()


def _stop() -> None:
    """A job survives a crash at any moment, so this is one: no thread is waited for."""
    from infermill.progress import hide
    from infermill.report import print_problem

    hide()
    print_problem("stopped", _how_to_go_on(sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _how_to_go_on(arguments: Sequence[str]) -> str:
    command = arguments[0] if arguments else ""
    if command in JOBS:
        how = "without --overwrite, and otherwise " if "--overwrite" in arguments else ""
        return f"finished parts stay: `infermill {command}` {how}with the same arguments resumes"
    if command == "datasets":
        return "what is written stays: the same command writes what is missing"
    return "the same command starts anew"


if __name__ == "__main__":
    main()
