"""Doing without pandas, in processes that are infermill's own.

Where pandas is installed, Arrow imports it to know objects of it when it sees them: half a second and 40 MB, for
objects that do not come up here.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _WithoutPandas(MetaPathFinder):
    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out here", name=name)
        return None


def leave_out_pandas() -> None:
    """Let `import pandas` fail in this process."""
    sys.meta_path.insert(0, _WithoutPandas())


def allow_pandas() -> None:
    """Let it succeed again: Spark Connect needs it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WithoutPandas)]
