"""Errors of the client that fetches files from the hub."""

from __future__ import annotations

#: huggingface_hub's own errors are OSErrors or ValueErrors; those of its HTTP client are neither,
#: and its releases use different clients.
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub")


def is_of_client(error: BaseException) -> bool:
    """Whether an error means that the hub did not answer."""
    return type(error).__module__.split(".")[0] in _CLIENTS
