"""A paramiko connection that logs in without a wasted round trip."""

from __future__ import annotations

import threading

import paramiko
from paramiko.auth_handler import AuthOnlyHandler
from paramiko.common import cMSG_SERVICE_REQUEST


class Connection(paramiko.ServiceRequestingTransport):  # type: ignore[misc]
    """Asks for the login service once and offers the first key in the same breath.

    paramiko's own Transport waits until the service is granted, which a server that goes on to look at keys always
    does (RFC 4252), and asks for it again with every key: one round trip for a login, and another for each key refused.
    """

    auth_handler: AuthOnlyHandler | None

    def ensure_session(self) -> None:
        """Ask for the login service unless that is done; a refusal ends the connection, and the login with it."""
        if self.auth_handler is None:
            request = paramiko.Message()
            request.add_byte(cMSG_SERVICE_REQUEST)
            request.add_string("ssh-userauth")
            self._send_message(request)
            self.auth_handler = self.get_auth_handler()

    def get_auth_handler(self) -> AuthOnlyHandler:
        """The part that sends keys and reads the answers."""
        return _Login(self)


class _Login(AuthOnlyHandler):  # type: ignore[misc]
    def wait_for_response(self, event: threading.Event) -> list[str]:
        # paramiko sends a key before it makes the event that the answer sets: a quick answer would never be noticed.
        # One has come when the login is done or, after a refusal, the user's name is gone.
        if self.authenticated or self.username is None:
            event.set()
        methods: list[str] = super().wait_for_response(event)
        return methods
