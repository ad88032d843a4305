"""The commands that `make bench-store` compares. Each moves a folder to or from s3://BUCKET/PREFIX."""

from __future__ import annotations

import sys
from pathlib import Path

AWS = ["aws", "s3", "cp", "--recursive", "--only-show-errors"]
BOTO3 = """
import os, sys, boto3
verb, folder, bucket, prefix = sys.argv[1:]
client = boto3.client("s3")
if verb == "put":
    for name in sorted(os.listdir(folder)):
        client.upload_file(os.path.join(folder, name), bucket, f"{prefix}/{name}")
else:
    os.makedirs(folder, exist_ok=True)
    for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.download_file(bucket, item["Key"], os.path.join(folder, os.path.basename(item["Key"])))
"""
S3FS = """
import os, sys, s3fs
verb, folder, bucket, prefix = sys.argv[1:]
files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
if verb == "put":
    files.put(folder + "/", f"{bucket}/{prefix}/", recursive=True)
else:
    files.get(f"{bucket}/{prefix}/", folder + "/", recursive=True)
"""
PEERS = ("aws", "boto3", "s3fs")


def peer(name: str, venv: Path, verb: str, folder: Path, bucket: str, prefix: str) -> list[str]:
    """Return the command with which another client does `verb`: put or get."""
    if name == "aws":
        remote = f"s3://{bucket}/{prefix}"
        return [
            str(venv / "bin" / "aws"),
            *AWS[1:],
            *([str(folder), remote] if verb == "put" else [remote, str(folder)]),
        ]
    script = {"boto3": BOTO3, "s3fs": S3FS}[name]
    return [str(venv / "bin" / "python"), "-c", script, verb, str(folder), bucket, prefix]


def ours(verb: str, folder: Path, url: str, manifest: Path) -> list[str]:
    """Return the command with which Requant does `verb`. It knows the sha256 of the files, as a stage does."""
    return [sys.executable, "-m", "infra.bench.store_contenders", verb, str(folder), url, str(manifest)]


def main() -> None:
    """Put files into the store (`put`), link them (`get`), check them out (`copy`), or only find them (`reuse`)."""
    from requant.tasks.artifact import Manifest
    from requant.tasks.pipeline.stage import put_files
    from requant.tasks.store import open_store

    verb, folder, url, text = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    store, manifest = open_store(url), Manifest.from_json(text.read_text())
    if verb == "put":
        put_files(store, folder, list(manifest.files))
    elif verb == "get":
        store.link_files(manifest, folder)
    elif verb == "copy":
        store.checkout(manifest, folder)
    elif store.manifest("bench", "0" * 64) != manifest:
        raise SystemExit("the artifact was not found")


if __name__ == "__main__":
    main()
