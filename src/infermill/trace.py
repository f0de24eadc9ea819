"""What each thread of a worker did and when, in the format that Perfetto and chrome://tracing open.

The format is the Trace Event Format's array of complete events (`"ph": "X"`), times in microseconds:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
import platform
import threading
import time

MAX_EVENTS = 1_000_000
"About 100 MB; what comes later is not kept, and the trace says so."


class Trace:
    """Events of this process; safe to use from any thread.

    Example:
        >>> trace = Trace()
        >>> trace.add("decode", time.perf_counter() - 0.25, time.perf_counter(), objects=8)
        >>> event = json.loads(trace.as_json())["traceEvents"][-1]
        >>> event["name"], event["ph"], event["args"], round(event["dur"], -4)
        ('decode', 'X', {'objects': 8}, 250000.0)
    """

    def __init__(self) -> None:
        # Shared by all processes of a machine, unlike perf_counter's: so that their traces fit together.
        self._epoch = time.time() - time.perf_counter()
        self._events: list[tuple[str, float, float, int, int]] = []
        self._names: dict[int, str] = {}
        self._left_out = 0

    def add(self, name: str, started: float, ended: float, objects: int = 1) -> None:
        """This thread did something from `started` to `ended` (time.perf_counter), with so many objects."""
        if len(self._events) >= MAX_EVENTS:
            self._left_out += 1
            return
        thread = threading.get_native_id()
        if thread not in self._names:
            self._names[thread] = threading.current_thread().name
        self._events.append((name, started, ended, thread, objects))

    def as_json(self) -> bytes:
        """The trace as a file."""
        process = os.getpid()
        named = {"ph": "M", "pid": process}
        events: list[dict[str, object]] = [
            {**named, "name": "process_name", "args": {"name": f"infermill worker on {platform.node()}"}},
            *(
                {**named, "name": "thread_name", "tid": thread, "args": {"name": name}}
                for thread, name in sorted(self._names.items())
            ),
        ]
        for name, started, ended, thread, objects in self._events:
            begin, length = (self._epoch + started) * 1e6, (ended - started) * 1e6
            event = {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": begin, "dur": length}
            events.append({**event, "args": {"objects": objects}})
        return json.dumps({"traceEvents": events, "events_left_out": self._left_out}).encode()
