"""Server side of the bundle: the installed coordinator."""

from fedpact_server.app import app

__all__ = ["app"]
