"""Credentials: the store that keeps several objects in step, its file, and the ways of getting them."""

from .login import Authenticator
from .store import RuntimeCredentialsStore, Snapshot

__all__ = ["Authenticator", "RuntimeCredentialsStore", "Snapshot"]
