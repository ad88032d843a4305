"""What may be told to everyone: no secrets, no folders of a machine, no numbers that JSON has not."""

from __future__ import annotations

import math
import re
from typing import Any

from requant.tasks.errors import redact

# An absolute path, or one below a home: all but its last part. Addresses and `owner/name` are none.
FOLDERS = re.compile(r"(?<![\w:/.@~}-])~?/(?:[^\s/'\"`,:;()]+/)+(?=[^\s/])|(?<![\w:/.@}-])/(?=[^\s/'\"`,:;()]+$)")
SERVER = re.compile(r"\burl:https?://\S+")


def public(value: Any) -> Any:
    """A document as anyone may read it: secrets by name, files without their folders, a private server as `url`."""
    if isinstance(value, dict):
        return {public(key) if isinstance(key, str) else key: public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    if isinstance(value, str):
        return SERVER.sub("url", FOLDERS.sub("", redact(value)))
    return without_non_finite(value)


def without_non_finite(value: Any) -> Any:
    """A document without numbers that JSON has not: they become null."""
    if isinstance(value, dict):
        return {key: without_non_finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
