"""The program of whole_life.py, with an error tracker that keeps what it would send, and prints it at the end."""

from __future__ import annotations

import logging
import sys
from typing import Any, List

import sentry_sdk
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.transport import Transport

from . import whole_life

envelopes: List[Any] = []


class Keep(Transport):
    def capture_envelope(self, envelope: Any) -> None:
        envelopes.append(envelope)


def main() -> None:
    sentry_sdk.init(
        dsn="https://public@sentry.test/1",
        transport=Keep(),
        include_local_variables=True,
        attach_stacktrace=True,
        send_default_pii=True,
        max_breadcrumbs=1000,
        traces_sample_rate=1.0,
        enable_logs=True,
        integrations=[LoggingIntegration(level=logging.DEBUG, event_level=logging.WARNING)],
    )
    whole_life.reporters.append(sentry_sdk.capture_exception)
    whole_life.main()
    sentry_sdk.flush(10)
    print("the envelopes:", len(envelopes), file=sys.stderr)
    for envelope in envelopes:
        print(envelope.serialize().decode("utf-8", "replace"), file=sys.stderr)


if __name__ == "__main__":
    main()
