"""Environment variables of this process and of its children: proxies, and the search path of modules."""

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
    """Exclude this machine from the user's proxy, which cannot reach servers on it.

    Both no_proxy and NO_PROXY are set, since clients differ in which they read first. The user's hosts stay in each.
    """
    if not any(value and name.lower() in PROXIES for name, value in environment.items()):
        return
    given = {name: value for name, value in environment.items() if value and name.lower() == "no_proxy"}
    preferred = given[max(given)] if given else ""  # Most clients prefer small letters, which sort behind capitals.
    for name in ("no_proxy", "NO_PROXY"):
        value = given.get(name, preferred)
        hosts = {host.strip().lower() for host in value.split(",")}
        missing = [] if "*" in hosts else [host for host in LOOPBACK if host not in hosts]
        environment[name] = ",".join(filter(None, [value, *missing]))


def variables_set(*names: str) -> list[str]:
    """Return which of these variables are set. `names` are in small letters, the result as in the environment."""
    return sorted(name for name, value in os.environ.items() if value and name.lower() in names)


def with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Copy an environment, and put Requant's modules first on its PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}
