"""How many objects of a job may fail."""

import math
from dataclasses import dataclass
from typing import Self

from infermill.errors import BudgetError, UsageError

MIN_OBJECTS = 100
"Settled before a job is stopped: the first failures of a job say little, and their rows say why."


@dataclass(frozen=True, slots=True)
class Budget:
    """A number of objects, or a share of those that are planned; None: all of them may fail."""

    text: str | None
    number: float
    is_share: bool

    @classmethod
    def parse(cls, text: str | int | None) -> Self:
        """Read `10`, `1%` or None.

        Raises:
            UsageError: it is neither a number nor a percentage.

        Example:
            >>> Budget.parse("1%").allows(2, 100)
            False
        """
        if text is None:
            return cls(None, 100, True)
        text = str(text)
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = -1.0
        is_share = text.endswith("%")
        if not 0 <= number < math.inf or (is_share and number > 100):
            raise UsageError(f"--max-failures {text} is neither a number nor a percentage", "write 10, or 1%")
        return cls(text, number, is_share)

    def allows(self, failed: int, planned: int) -> bool:
        """Whether so many of the planned objects may fail."""
        return failed <= (planned * self.number / 100 if self.is_share else self.number)

    def check(self, failed: int, settled: int, planned: int) -> None:
        """Stop a job that cannot keep to its budget any more, whatever becomes of the objects that are left.

        Raises:
            BudgetError: it cannot; never before a hundred objects, or all, are settled.
        """
        if settled < planned and settled >= MIN_OBJECTS and not self.allows(failed, planned):
            raise BudgetError(
                f"stopped: {failed:,} of the first {settled:,} objects fail, and {planned:,} may have no more than "
                f"--max-failures {self.text}",
                "what is done stays, with a row for each; the same command with a larger budget resumes",
            )
