"""Long answers in pages, each with a `Link` header to the next."""

from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request

Row = TypeVar("Row")


def one_page(request: Request, rows: Sequence[Row], size: int) -> tuple[list[Row], dict[str, str]]:
    """Return the rows from `?cursor=` on, and the headers of the answer."""
    start = int(request.query_params.get("cursor", 0))
    end = start + size
    following = request.url.include_query_params(cursor=end)
    headers = {"Link": f'<{following}>; rel="next"'} if end < len(rows) else {}
    return list(rows[start:end]), headers
