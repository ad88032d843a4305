"""What processes of ours need in their environment, beside what the user's says of proxies and modules."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tasks.errors import RequantError, redact

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")
# What a client of HTTP raises when it is made: a proxy of an unknown kind, a package that is missing for it, no such
# file of certificates.
UNUSABLE = (ImportError, ValueError, OSError, httpx.InvalidURL)


def bypass_proxy_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Keep requests to this machine away from the user's proxy, which reaches no server on it.

    Some clients read no_proxy first and others NO_PROXY: both are set, and the user's hosts stay in each.
    """
    if not any(value and name.lower() in PROXIES for name, value in environment.items()):
        return
    given = {name: value for name, value in environment.items() if value and name.lower() == "no_proxy"}
    preferred = given[max(given)] if given else ""  # most clients prefer small letters, which sort behind capitals
    for name in ("no_proxy", "NO_PROXY"):
        value = given.get(name, preferred)
        hosts = {host.strip().lower() for host in value.split(",")}
        missing = [] if "*" in hosts else [host for host in LOOPBACK if host not in hosts]
        environment[name] = ",".join(filter(None, [value, *missing]))


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


def variables_set(*names: str) -> list[str]:
    """Find which of these variables, named in small letters, are set, in the spelling of the environment."""
    return sorted(name for name, value in os.environ.items() if value and name.lower() in names)


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment, with our modules before the user's on its PYTHONPATH."""
    package = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}
