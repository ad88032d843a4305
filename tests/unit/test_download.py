"""download: the parts that need no Hub."""

from __future__ import annotations

from tasks.download import download_key
from tasks.hub.revision import HubFile, Revision

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_download_is_keyed_by_repo_type_and_commit_and_by_nothing_else() -> None:
    one = HubFile("config.json", 2, "b" * 40, None)
    base = Revision("a/b", SHA, (one,))
    assert download_key(base) == download_key(Revision("a/b", SHA, ()))
    others = {
        download_key(Revision("a/c", SHA, (one,))),
        download_key(Revision("a/b", SHA[::-1], (one,))),
        download_key(Revision("a/b", SHA, (one,), "dataset")),
        download_key(base),
    }
    assert len(others) == 4
