"""Clients of HTTP servers, with the proxy and the certificates of the user's environment."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import httpx

from requant.tasks.environment import CERTIFICATES, PROXIES, variables_set
from requant.tasks.errors import RequantError, redact

# A client cannot be made with a proxy of an unknown kind or one that needs a missing package, or without a file of
# certificates.
CLIENT_ERRORS = (ImportError, ValueError, OSError, httpx.InvalidURL)


def is_loopback(url: str) -> bool:
    """Check whether an address is on this machine."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # It is a name, or no address.
        return False


def http_client(url: str, timeout_s: float) -> httpx.Client:
    """Make a client for the server at `url`: through the user's proxy, unless that server is on this machine.

    Both use the user's certificates. Raises RequantError if the environment allows no client.
    """
    try:
        certificates = httpx.create_ssl_context()  # With trust_env=False the client does not read SSL_CERT_FILE.
        return httpx.Client(timeout=timeout_s, verify=certificates, trust_env=not is_loopback(url))
    except CLIENT_ERRORS as error:
        raise RequantError(no_client(error, url)) from error


def no_client(error: BaseException, what: str) -> str:
    """Say why no client could be made, and name the variables that it reads, without values, which may be secret."""
    names = variables_set(*(CERTIFICATES if isinstance(error, OSError) else PROXIES))
    remedy = f"correct or unset {', '.join(names)}" if names else "mend this Python's installation"
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{what} cannot be asked ({redact(first)[:300]}): {remedy}"
