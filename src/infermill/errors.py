"""What can go wrong, as a small tree.

InfermillError              exit 1; message, and a hint that says what to do next
├── UsageError              exit 2; the command or a setting cannot be right
│   ├── ModelError          the model card, or the network that it names
│   │   └── MisfitError     how the network answered when it was first run, which is the same wherever it is
│   └── JobMismatchError    the output holds another job
├── BudgetError             exit 3; more objects fail than the budget allows; the job can be resumed
├── EvidenceError           exit 3; a network in less precision agrees less than was asked for; nothing is written
├── SourceError             the source cannot be listed, or holds nothing
├── RuntimeDiedError        the process in which a runtime executes the network has died
└── StoreError              a store refuses or does not answer; the job stops and can be resumed

BadInputError               one input cannot be predicted: caught at one place in the
                            pipeline, where it becomes a failure row; never seen by a user
"""

import signal
from pathlib import Path

from infermill.types import Failure, FailureCode, Stage, Summary


class InfermillError(Exception):
    """A problem that the user can act on, told without a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(InfermillError):
    """The command or a setting cannot be right."""

    exit_code = 2


class ModelError(UsageError):
    """The model card is wrong, or the network does not fit it."""


class MisfitError(ModelError):
    """The network has been loaded, and its answer to a blank input does not fit its card."""


class JobMismatchError(UsageError):
    """The output holds a job with another fingerprint."""


class BudgetError(InfermillError):
    """More objects fail than the budget allows. What is finished stays, and the job can be resumed.

    `summary` is that of the objects that were done until then, where a job has been stopped.
    """

    exit_code = 3
    summary: Summary | None = None


class EvidenceError(InfermillError):
    """A network in less precision agrees with fp32 less than was asked for. Nothing is written."""

    exit_code = 3


class SourceError(InfermillError):
    """The source cannot be listed, or holds nothing to predict on."""


class RuntimeDiedError(InfermillError):
    """The process in which a runtime executes the network has died; `status` is its exit code, or minus the signal."""

    def __init__(self, message: str, hint: str = "", status: int = 1) -> None:
        super().__init__(message, hint)
        self.status = status


def guide(name: str) -> str:
    """Where the document is that a hint points to: in the installed package, or else in the repository.

    Example:
        >>> guide("model-card.md")
        'docs/model-card.md'
    """
    installed = Path(__file__).with_name("docs") / name
    return str(installed) if installed.is_file() else f"docs/{name}"


def death_of(status: int) -> str:
    """How a process ended, of which `status` is the exit code, or minus the signal.

    Example:
        >>> death_of(-11)
        'SIGSEGV'
    """
    if status >= 0:
        return f"exit code {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"


class StoreError(InfermillError):
    """A store refuses or does not answer. What is finished stays, and the job can be resumed."""


class BadInputError(Exception):
    """One input cannot be predicted; it becomes a failure row."""

    def __init__(self, stage: Stage, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(stage, code, message)
