"""Remove what must not be published: secrets, folders of a machine, and numbers that JSON cannot hold."""

from __future__ import annotations

import math
import re
from typing import Any

from requant.tasks.errors import redact

# All but the last part of an absolute path, or of one below a home. URLs and `owner/name` do not match.
FOLDERS = re.compile(r"(?<![\w:/.@~}-])~?/(?:[^\s/'\"`,:;()]+/)+(?=[^\s/])|(?<![\w:/.@}-])/(?=[^\s/'\"`,:;()]+$)")
SERVER = re.compile(r"\burl:https?://\S+")


def public(value: Any) -> Any:
    """Copy a document without secrets, the folders of files, and the address of a private server."""
    if isinstance(value, dict):
        return {public(key) if isinstance(key, str) else key: public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part) for part in value]
    if isinstance(value, str):
        return SERVER.sub("url", FOLDERS.sub("", redact(value)))
    return without_non_finite(value)


def without_non_finite(value: Any) -> Any:
    """Copy a document, with null for infinity and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_non_finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
