"""Which operation on S3 and the Hub is tried under which fault: all of them at night, some on every change."""

from __future__ import annotations

from collections.abc import Sequence

from tests.factories.fault_proxy import KINDS

FOREVER, SKEW = "503 for ever", "skew"  # of S3 only: a server that never gets well, a clock that is wrong
S3_KINDS = (*KINDS, FOREVER, SKEW)
S3_OPERATIONS = (
    "put small", "put new", "put file", "put parts", "complete", "get small", "get file", "head", "list", "delete",
)  # fmt: skip
HUB_OPERATIONS = ("tree", "download", "resume", "upload", "commit")
# The worst fault of each operation: a flipped bit if it moves data, otherwise a lost answer that makes the client
# repeat it.
MOVES_BYTES = {
    "put file", "put parts", "get small", "get file", "list", "tree", "download", "resume", "upload",
}  # fmt: skip

Case = tuple[str, str]
GUARDS: set[Case] = {("commit", "twice")}  # that nothing is published twice


def most_dangerous(operation: str) -> str:
    return "flip" if operation in MOVES_BYTES else "lost"


def all_cases() -> list[Case]:
    """Every operation under every fault."""
    s3 = [(name, kind) for kind in S3_KINDS for name in S3_OPERATIONS]
    return s3 + [(name, kind) for kind in KINDS for name in HUB_OPERATIONS]


def chosen(operations: Sequence[str], kinds: Sequence[str]) -> set[Case]:
    """Every operation under what it fears most and at least one other fault, and every fault with some operation."""
    cases = {(name, most_dangerous(name)) for name in operations}
    others = [kind for kind in kinds if kind not in {fault for _, fault in cases}]
    for turn in range(max(len(operations), len(others))):
        cases.add((operations[turn % len(operations)], others[turn % len(others)]))
    return cases


def cases_of_every_change() -> set[Case]:
    """The cases that are tried on every change."""
    return chosen(S3_OPERATIONS, S3_KINDS) | chosen(HUB_OPERATIONS, KINDS) | GUARDS
