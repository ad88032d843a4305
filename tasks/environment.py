"""The environment of this process and of those that it starts: proxies, and where our modules are."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import requant

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
CERTIFICATES = ("ssl_cert_file", "ssl_cert_dir")
PACKAGE_PARENT = Path(requant.__file__).absolute().parent.parent  # the folder from which `import requant` works


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


def variables_set(*names: str) -> list[str]:
    """Find which of these variables, named in small letters, are set, in the spelling of the environment."""
    return sorted(name for name, value in os.environ.items() if value and name.lower() in names)


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment, with our modules before the user's on its PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}
