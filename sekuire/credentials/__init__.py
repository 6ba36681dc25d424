"""Store credentials for several objects and processes, and renew them by the login methods."""

from .authenticator import Authenticator
from .store import RuntimeCredentialsStore, Snapshot

__all__ = ["Authenticator", "RuntimeCredentialsStore", "Snapshot"]
