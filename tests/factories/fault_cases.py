"""Operations on S3 and the Hub, each under one fault: what happened, as JSON. Run by test_fault_matrix.py.

A process of its own, since the addresses of both servers are those of the proxies here. The variables say where the
servers are (REQUANT_FAULTS_S3 and _HUB). Arguments: a folder to work in, and the cases as a JSON list of pairs of an
operation and a fault.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.factories.fault_matrix import FOREVER, HUB_OPERATIONS, S3_OPERATIONS, SKEW
from tests.factories.fault_proxy import FaultProxy

S3_URL, HUB_URL = os.environ["REQUANT_FAULTS_S3"], os.environ["REQUANT_FAULTS_HUB"]
S3, HUB = FaultProxy(S3_URL), FaultProxy(HUB_URL)
os.environ.update(HF_ENDPOINT=HUB.url, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_DISABLE_XET="1")

import botocore.auth  # noqa: E402

from infra.dev.hub.launch import HubStandIn  # noqa: E402
from requant.tasks.artifact import File, Manifest, file_of  # noqa: E402
from requant.tasks.download import download, download_key  # noqa: E402
from requant.tasks.errors import RequantError  # noqa: E402
from requant.tasks.hub import client  # noqa: E402
from requant.tasks.hub.release import release  # noqa: E402
from requant.tasks.hub.revision import Revision, resolve  # noqa: E402
from requant.tasks.recipe.recipe import Publish  # noqa: E402
from requant.tasks.store import Store, open_store, transfer  # noqa: E402
from requant.tasks.store.folder import FolderBackend  # noqa: E402
from requant.tasks.store.s3 import S3Backend  # noqa: E402
from requant.tasks.store.store import blob_key  # noqa: E402

STALL = 2.5  # seconds; a read that brings nothing for one is given up here
transfer.MAX_SINGLE_PUT_BYTES, transfer.PART_BYTES = 1 << 20, 5 << 20  # S3's smallest part
client.STALL_TIMEOUT_S = 1.0
SMALL = b'{"some": "object"}' * 20


@dataclass
class Outcome:
    """`result` is success, a sentence, or what must not be: CORRUPT or an unexpected exception."""

    operation: str
    fault: str
    result: str
    struck: int  # requests that were spoilt
    calls: int  # of the operation: Prefect calls a stage again after a failure that passes


@dataclass
class Operation:
    """How to spoil it, do it, and see on the server itself whether all is well, after a failure too."""

    method: str
    address: str
    do: Callable[[], object]
    intact: Callable[[], bool]
    after: int = 0
    harmless: Callable[[], bool] = lambda: True


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    with endpoint(S3_URL):
        direct = S3Backend("requant", "faults", retry_s=10)
        direct.keys("x"), direct.size("x")
    with endpoint(S3.url):
        through = S3Backend("requant", "faults", retry_s=10, read_timeout_s=1.0)
        impatient = S3Backend("requant", "faults", retry_s=3, read_timeout_s=1.0)
        through.size("x"), impatient.size("x")
    hub = HubStandIn(folder / "nothing")
    hub.url = HUB_URL

    def s3_case(name: str, fault: str) -> Outcome:
        backend = impatient if fault == FOREVER else through
        return run(S3, name, fault, s3_operation(name, backend, direct, folder / f"s3-{slug(name)}-{slug(fault)}"))

    def hub_case(name: str, fault: str) -> Outcome:
        return run(HUB, name, fault, hub_operation(name, hub, folder / f"hub-{name}-{slug(fault)}"))

    cases: list[tuple[str, str]] = [(name, fault) for name, fault in json.loads(sys.argv[2])]
    one_by_one = {"refuse", SKEW}
    with ThreadPoolExecutor(8) as pool:
        together = [(name, fault) for name, fault in cases if fault not in one_by_one]
        outcomes = list(pool.map(lambda case: (s3_case if case[0] in S3_OPERATIONS else hub_case)(*case), together))
    refused = [name for name, fault in cases if fault == "refuse"]
    with ThreadPoolExecutor(2) as pool:  # while a server is away, it is away for all
        away = pool.submit(lambda: [s3_case(name, "refuse") for name in refused if name in S3_OPERATIONS])
        outcomes += [hub_case(name, "refuse") for name in refused if name in HUB_OPERATIONS]
        outcomes += away.result()
    late = [name for name, fault in cases if fault == SKEW]
    skewed = {name: s3_operation(name, through, direct, folder / f"s3-{slug(name)}-skew") for name in late}
    right = botocore.auth.get_current_datetime
    for name, operation in skewed.items():
        botocore.auth.get_current_datetime = lambda *how, **named: right(*how, **named) - datetime.timedelta(hours=1)
        outcome = run(S3, name, SKEW, replace(operation, harmless=lambda: True))
        botocore.auth.get_current_datetime = right
        outcomes.append(outcome if operation.harmless() else replace(outcome, result="CORRUPT"))
    sys.stdout.write(json.dumps([asdict(outcome) for outcome in outcomes]))


def run(proxy: FaultProxy, name: str, kind: str, operation: Operation) -> Outcome:
    struck = len(proxy.struck)
    fault = None
    if kind != SKEW:
        known, times = ("503", 1000) if kind == FOREVER else (kind, 1)
        fault = proxy.fault(
            known, operation.method, operation.address, times=times, after=operation.after, seconds=STALL
        )
    calls, result = 0, ""
    while not result:
        calls += 1
        try:
            operation.do()
            result = "success" if operation.intact() else "CORRUPT"
        except RequantError as error:
            if error.retryable and calls < 4:
                time.sleep(0.5 * 2 ** (calls - 1))
                continue
            result = str(error) if operation.harmless() else "CORRUPT"
        except Exception as error:
            result = f"UNEXPECTED {type(error).__name__}: {error}"
    struck = sum(1 for each in proxy.struck if each is fault)
    return Outcome(name, kind, result, struck, calls)


def s3_operation(name: str, backend: S3Backend, direct: S3Backend, folder: Path) -> Operation:
    folder.mkdir()
    small = f"facts/{folder.name}/object"
    store = Store(backend, FolderBackend(folder / "near"))

    def file(size: int) -> File:
        (folder / "file").write_bytes(os.urandom(size))
        return file_of(folder, "file")

    def there(file: File) -> bool:
        copy = folder / f"check-{os.urandom(4).hex()}"
        return direct.get_file(blob_key(file.sha256), copy) == file.sha256

    if name in {"put small", "put new"}:
        put = backend.write if name == "put small" else backend.write_new
        return Operation("PUT", small, lambda: put(small, SMALL), lambda: direct.read(small) == SMALL, after=50)
    if name in {"get small", "list", "delete"}:
        direct.write(small, SMALL)
        if name == "get small":
            came: list[bytes | None] = []
            return Operation("GET", small, lambda: came.append(backend.read(small)), lambda: came == [SMALL], after=50)
        if name == "list":
            listed: list[list[str]] = []
            return Operation(
                "GET",
                f"prefix=faults/facts/{folder.name}/",
                lambda: listed.append(list(backend.keys(f"facts/{folder.name}"))),
                # A listing carries no hash: with a bit flipped it may name what is not there, and nothing else.
                lambda: len(listed[0]) == 1 and (listed == [[small]] or direct.read(listed[0][0]) is None),
                after=50,
            )
        return Operation("DELETE", small, lambda: backend.delete(small), lambda: direct.size(small) is None)
    if name in {"put file", "put parts", "complete"}:
        sent = file(300_000 if name == "put file" else 6 << 20)
        key = blob_key(sent.sha256)
        method, address, after = {
            "put file": ("PUT", key, 100_000),
            "put parts": ("PUT", f"{key}.*partNumber=2", 500_000),
            "complete": ("POST", f"{key}.*uploadId", 100),
        }[name]
        copy = folder / "copy"

        def put_blob() -> None:
            copy.write_bytes((folder / "file").read_bytes())
            store.put_blob(copy, sent)

        harmless = lambda: direct.size(key) is None or there(sent)  # noqa: E731
        return Operation(method, address, put_blob, lambda: there(sent), after, harmless)
    blob = file(6 << 20)
    direct.put_file(blob_key(blob.sha256), folder / "file", blob.sha256)
    if name == "head":
        found: list[bool] = []
        return Operation("HEAD", blob.sha256, lambda: found.append(store.has_blob(blob)), lambda: found == [True])
    return Operation(
        "GET",
        blob.sha256,
        lambda: store.link_files(Manifest.of([blob]), folder / "out"),
        lambda: file_of(folder / "out", "file") == blob,
        after=1_000_000,
    )


def hub_operation(name: str, hub: HubStandIn, folder: Path) -> Operation:
    source, shard = folder / "source", "model.safetensors"
    source.mkdir(parents=True)
    (source / shard).write_bytes(os.urandom(3 << 20))
    (source / "config.json").write_bytes(SMALL)
    if name in {"upload", "commit"}:
        manifest = Manifest.of(file_of(source, path) for path in (shard, "config.json"))
        (source / "README.md").write_text("---\nquantized_by: requant\n---\n")
        target = f"me/{folder.name}"

        def intact() -> bool:
            held = {f.path: f for f in resolve(target).files}
            return all(held[f.path].size == f.size and held[f.path].sha256 in {f.sha256, None} for f in manifest.files)

        method, address = ("PUT", f"/_lfs/models/{target}/") if name == "upload" else ("POST", f"{target}/commit/")
        after = 1_000_000 if name == "upload" else 100
        return Operation(method, address, lambda: put_release(target, source, manifest), intact, after)
    repo_id = f"demo/{folder.name}"
    sha = hub.seed(repo_id, source)
    if name == "tree":
        resolved: list[Revision] = []
        return Operation(
            "GET",
            f"/api/models/{repo_id}/revision",
            lambda: resolved.append(resolve(repo_id)),
            lambda: resolved[-1].sha == sha and shard in {f.path for f in resolved[-1].files},
            after=100,
        )
    base, store = resolve(repo_id), open_store((folder / "store").as_uri())
    if name == "resume":
        left = store.work_folder("download", download_key(base)) / shard
        left.write_bytes((source / shard).read_bytes()[: 1 << 20])
    return Operation(
        "GET",
        f"{repo_id}/resolve/{sha}/{shard}",
        lambda: download(store, base),
        lambda: store.read_blob(download(store, base).manifest[shard]) == (source / shard).read_bytes(),
        after=500_000,
        harmless=lambda: store.manifest("download", download_key(base)) is None,
    )


def put_release(target: str, folder: Path, manifest: Manifest) -> None:
    base = Revision("demo/base", "0" * 40, ())
    release(Publish(repo_id=target), base, folder, manifest, ["README.md"], bits=4)


@contextlib.contextmanager
def endpoint(url: str) -> Iterator[None]:
    """Clients that are made inside talk to `url`."""
    os.environ["AWS_ENDPOINT_URL_S3"] = url
    yield


def slug(text: str) -> str:
    return text.replace(" ", "-")


if __name__ == "__main__":
    assert threading.current_thread() is threading.main_thread()
    main()
