"""Asking a store again that does not answer, until a deadline."""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from obstore.exceptions import GenericError

from infermill.stores import STORE_ERRORS, error_code, explain
from infermill.types import StoreOptions

Answer = TypeVar("Answer")
_PASSING = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
}
# Of the machine's own credentials, 169.254.…, there may be none, and then there never are.
_PASSING_TEXT = re.compile(r"status code: (?:5\d\d|408|429) |\A(?!.*//169\.254\.).*HTTP error: ", re.DOTALL)
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 15.0
_TELL_EVERY_SECONDS = 30.0
_Server = tuple[str | None, str]
_answered: set[_Server] = set()
_told: dict[_Server, float] = {}
logger = logging.getLogger("infermill")


class Patience:
    """Pauses, longer and longer ones with jitter, until so many seconds have passed since it was made."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self) -> bool:
        """Sleep for a while; False, and at once, where that would go beyond the deadline."""
        seconds = random.uniform(0.5, 1) * self._pause  # noqa: S311
        if time.monotonic() + seconds > self._deadline:
            return False
        time.sleep(seconds)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return True


def patiently(ask: Callable[[], Answer], uri: str, options: StoreOptions) -> Answer:
    """What `ask` returns; where the store does not answer, it is called again until the deadline.

    Args:
        ask: sends one request; object_store has retried what it retries: blips, and not of conditional puts.
        uri: what it is about, for the log.
        options: their `store_deadline` counts.

    Raises:
        BaseError, OSError: as `ask`; at once where the same request would get the same answer again, and where
            nothing is found at the store's address, and never was.
    """
    patience = Patience(options.store_deadline)
    server = _server(uri, options)
    while True:
        try:
            answer = ask()
        except STORE_ERRORS as error:
            if not is_unreached(error):
                _answered.add(server)
            if not is_passing(error) or server not in _answered:
                raise
            _tell(error, uri, server)
            if not patience.pause():
                raise
        else:
            _answered.add(server)
            return answer


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: the store was busy, was not reached, or broke off."""
    if error_code(error) in _PASSING or isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return isinstance(error, GenericError) and _PASSING_TEXT.search(str(error)) is not None


def is_unreached(error: Exception) -> bool:
    """Whether nothing was found at the store's address."""
    return isinstance(error, ConnectionRefusedError) or "kind: Connect," in str(error)


def has_answered(uri: str, options: StoreOptions) -> None:
    """The store at `uri` is known to be there: another process has reached it."""
    _answered.add(_server(uri, options))


def _server(uri: str, options: StoreOptions) -> _Server:
    return options.endpoint_url, uri.partition("://")[2].partition("/")[0]


def _tell(error: Exception, uri: str, server: _Server) -> None:
    """Warn that a store is being asked again: once in a while, since many threads wait for it at once."""
    now = time.monotonic()
    if now - _told.get(server, -_TELL_EVERY_SECONDS) >= _TELL_EVERY_SECONDS:
        _told[server] = now
        logger.warning("asking again: %s", explain(error, uri).message)
