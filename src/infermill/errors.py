"""What can go wrong, as a small tree.

InfermillError              exit 1; message, and a hint that says what to do next
├── UsageError              exit 2; the command or a setting cannot be right
│   ├── ModelError          the model card, or the network that it names
│   └── JobMismatchError    the output holds another job
├── BudgetError             exit 3; more objects fail than the budget allows; the job can be resumed
├── SourceError             the source cannot be listed, or holds nothing
└── StoreError              a store refuses or does not answer; the job stops and can be resumed

BadInputError               one input cannot be predicted: caught at one place in the
                            pipeline, where it becomes a failure row; never seen by a user
"""

from infermill.types import Failure, FailureCode, Stage


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


class JobMismatchError(UsageError):
    """The output holds a job with another fingerprint."""


class BudgetError(InfermillError):
    """More objects fail than the budget allows. What is finished stays, and the job can be resumed."""

    exit_code = 3


class SourceError(InfermillError):
    """The source cannot be listed, or holds nothing to predict on."""


class StoreError(InfermillError):
    """A store refuses or does not answer. What is finished stays, and the job can be resumed."""


class BadInputError(Exception):
    """One input cannot be predicted; it becomes a failure row."""

    def __init__(self, stage: Stage, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(stage, code, message)
