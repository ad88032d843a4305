"""The functions of huggingface_hub that are not part of its documented interface.

constraints.txt pins the version of huggingface_hub. A new version must be checked against this list.
"""

from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    http_stream_backoff,
)
from huggingface_hub.utils._http import default_client_factory, parse_ratelimit_headers

__all__ = [
    "build_hf_headers",
    "default_client_factory",
    "get_session",
    "hf_raise_for_status",
    "http_stream_backoff",
    "parse_ratelimit_headers",
]
