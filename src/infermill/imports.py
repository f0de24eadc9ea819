"""Doing without what other libraries import for cases that do not come up, in processes that are infermill's own.

Where pandas is installed, Arrow imports it to know objects of it when it sees them: half a second and 40 MB. OpenVINO
imports its converters of networks, which takes longer than all of its runtime.
"""

import sys
from collections.abc import Sequence

LEFT_OUT = {"pandas", "openvino.tools"}


class _Without:
    @staticmethod
    def find_spec(name: str, _path: Sequence[str] | None = None, _target: object = None) -> None:
        if name in LEFT_OUT:
            raise ModuleNotFoundError(f"{name} is left out here", name=name)


def leave_out() -> None:
    """Let the import of pandas, and of OpenVINO's converters, fail in this process."""
    sys.meta_path.insert(0, _Without)


def leave_out_no_more() -> None:
    """Let it succeed again: Spark Connect needs pandas."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Without]
