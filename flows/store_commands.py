"""`requant store ...`: what lies in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flows.command import command
from tasks.errors import RequantError
from tasks.store import open_store


@click.group()
def store() -> None:
    """Look at and into the store (REQUANT_STORE)."""


@command("ls")
def store_ls() -> tuple[dict[str, Any], str, int]:
    """List the artifacts."""
    opened = open_store()
    opened.check()
    rows: list[dict[str, Any]] = [
        {
            "stage": entry.stage,
            "key": entry.key,
            "digest": entry.manifest.digest,
            "files": len(entry.manifest.files),
            "bytes": entry.manifest.size,
            "started": entry.provenance.get("started"),
        }
        for entry in opened.entries()
    ]
    rows.sort(key=lambda row: str(row["started"] or ""))
    text = "\n".join(f"{r['stage']:10} {r['digest'][:12]} {r['bytes']:>16,} {r['started']}" for r in rows)
    return {"store": opened.url, "artifacts": rows}, text or f"{opened.url} is empty", 0


@command("verify")
@click.option("--deep", is_flag=True, help="Hash every blob, not only look whether it is there.")
def store_verify(deep: bool) -> tuple[dict[str, Any], str, int]:
    """Check that every artifact's blobs are there."""
    from tasks.store.verify import verify

    opened = open_store()
    opened.check()
    checked, problems = verify(opened, deep=deep)
    text = "\n".join([f"{checked} blobs checked, {len(problems)} problems", *problems])
    return {"checked": checked, "problems": problems}, text, 1 if problems else 0


@command("checkout")
@click.argument("digest")
@click.argument("folder", type=click.Path(path_type=Path))
def store_checkout(digest: str, folder: Path) -> tuple[dict[str, Any], str, int]:
    """Lay the artifact whose digest begins with DIGEST into FOLDER."""
    opened = open_store()
    opened.check()
    found = {e.manifest.digest: e.manifest for e in opened.entries() if e.manifest.digest.startswith(digest)}
    if len(found) != 1:
        raise RequantError(f"{len(found)} artifacts in {opened.url} begin with {digest!r}: see requant store ls")
    ((whole, manifest),) = found.items()
    path = opened.checkout(manifest, folder).resolve()
    return {"digest": whole, "path": str(path)}, f"{manifest.size:,} bytes in {path}", 0


for each in (store_ls, store_verify, store_checkout):
    store.add_command(each)
