"""Deprecated calls that transformers only logs, collected so that a test which causes one fails."""

import logging


class Deprecations(logging.Handler):
    """What transformers logs of calls that it will stop taking: it doesn't use Python's warnings for most."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # The second is of its own assisted decoding, which calls generate so
        if "deprecated" in message and "Passing `generation_config` together with" not in message:
            self.said.append(message)

    def check(self) -> None:
        said, self.said = self.said, []
        assert not said, said


DEPRECATIONS = Deprecations()
logging.getLogger("transformers").addHandler(DEPRECATIONS)
