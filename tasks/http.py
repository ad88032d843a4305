"""Clients of HTTP servers, with the proxy and the certificates that the user's environment names."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import httpx

from requant.tasks.environment import CERTIFICATES, PROXIES, variables_set
from requant.tasks.errors import RequantError, redact

# What a client of HTTP raises when it is made: a proxy of an unknown kind, a package that is missing for it, no such
# file of certificates.
UNUSABLE = (ImportError, ValueError, OSError, httpx.InvalidURL)


def is_loopback(url: str) -> bool:
    """Say whether an address leads to this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or no address at all
        return False


def http_client(url: str, timeout_s: float) -> httpx.Client:
    """Make a client for the server at `url`: through the user's proxy, unless that server is on this machine.

    The user's certificates hold for both. Raises RequantError where the environment allows no client.
    """
    try:
        certificates = httpx.create_ssl_context()  # with trust_env=False the client would not read SSL_CERT_FILE
        return httpx.Client(timeout=timeout_s, verify=certificates, trust_env=not is_loopback(url))
    except UNUSABLE as error:
        raise RequantError(no_client(error, url)) from error


def no_client(error: BaseException, what: str) -> str:
    """Say why no client could be made, and name the variables that it reads. Their values may hold a password."""
    names = variables_set(*(CERTIFICATES if isinstance(error, OSError) else PROXIES))
    remedy = f"correct or unset {', '.join(names)}" if names else "mend this Python's installation"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{what} cannot be asked ({redact(first)[:300]}): {remedy}"
