"""The store: first manifest wins, no manifest without its blobs, no writable link to a blob."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from requant.tasks.artifact import File, Manifest
from requant.tasks.errors import CorruptBlob, RecipeError, StoreError
from requant.tasks.record import StageRecord
from requant.tasks.store import Store, open_store
from requant.tasks.store.catalog import read_catalog
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.store import blob_key
from tests.factories.checkpoints import write_files
from tests.factories.stores import Remote

KEY = "a" * 64


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "remote")


@pytest.fixture
def far(remote: Remote, tmp_path: Path) -> Store:
    return Store(remote, cache=FolderBackend(tmp_path / "near"))


def put(store: Store, folder: Path, files: dict[str, bytes]) -> Manifest:
    made = write_files(folder, files)
    for file in made:
        store.put_blob(folder / file.path, file)
    return Manifest.of(made)


def kept(store: Store, folder: Path, files: dict[str, bytes], key: str = KEY) -> Manifest:
    manifest = put(store, folder, files)
    return store.commit("quantize", key, manifest, StageRecord({"seconds": 1}))


FILES = {"config.json": b"{}", "sub/weights.safetensors": b"weights", "empty": b""}


def test_a_kept_artifact_is_found_and_read_back(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "work", FILES)
    assert store.manifest("quantize", KEY) == manifest
    assert {f.path: store.read_blob(f) for f in manifest.files} == FILES
    assert store.provenance("quantize", KEY) == StageRecord({"seconds": 1})


def test_a_key_or_stage_that_was_never_kept_is_not_found(store: Store, tmp_path: Path) -> None:
    kept(store, tmp_path / "work", FILES)
    assert store.manifest("quantize", "b" * 64) is None
    assert store.manifest("validate", KEY) is None
    assert store.provenance("validate", KEY) == StageRecord()


def test_what_a_store_lists_of_a_stage_is_read_whether_or_not_its_blobs_are_there(store: Store, tmp_path: Path) -> None:
    assert not store.has_any("quantize") and store.records("quantize") == {}
    manifest = kept(store, tmp_path / "work", FILES)
    store.commit("quantize", "b" * 64, manifest, StageRecord({"seconds": 2}))
    assert store.has_any("quantize") and not store.has_any("validate")
    assert store.records("quantize") == {KEY: StageRecord({"seconds": 1}), "b" * 64: StageRecord({"seconds": 2})}
    assert len(store.records("quantize", limit=1)) == 1
    store.backend.write(f"provenance/quantize/{KEY}", b"{")
    assert store.records("quantize") == {KEY: StageRecord(), "b" * 64: StageRecord({"seconds": 2})}
    store.backend.delete(blob_key(manifest["config.json"].sha256))
    assert store.manifest("quantize", KEY) is None
    assert store.read_manifest("quantize", KEY) == manifest
    assert store.read_manifest("quantize", "c" * 64) is None


def test_a_blob_has_a_path_on_this_machine_only_while_it_is_here_in_its_size(far: Store, tmp_path: Path) -> None:
    manifest = kept(far, tmp_path / "work", FILES)
    file = manifest["config.json"]
    path = far.local_path(file)
    assert path is not None and path.read_bytes() == FILES["config.json"]
    assert far.local_path(File(file.path, file.size + 1, file.sha256)) is None
    far.cache.delete(blob_key(file.sha256))
    assert far.local_path(file) is None and far.sees_blob(file)


def test_the_first_manifest_of_a_key_wins(store: Store, tmp_path: Path) -> None:
    first = kept(store, tmp_path / "one", {"a": b"first"})
    second = kept(store, tmp_path / "two", {"a": b"second"})
    assert second == first == store.manifest("quantize", KEY)
    assert store.read_blob(first["a"]) == b"first"


def test_the_record_beside_an_artifact_is_that_of_the_run_that_made_it(store: Store, tmp_path: Path) -> None:
    store.commit("quantize", KEY, put(store, tmp_path / "one", {"a": b"1"}), StageRecord({"run": "first"}))
    store.commit("quantize", KEY, put(store, tmp_path / "two", {"a": b"2"}), StageRecord({"run": "second"}))
    assert store.provenance("quantize", KEY) == StageRecord({"run": "first"})


def test_a_manifest_with_a_missing_blob_is_not_found_and_may_be_made_again(store: Store, tmp_path: Path) -> None:
    first = kept(store, tmp_path / "one", {"a": b"lost", "b": b"there"})
    store.backend.delete(blob_key(first["a"].sha256))
    assert store.manifest("quantize", KEY) is None
    second = kept(store, tmp_path / "two", {"a": b"new"})
    assert second != first and store.manifest("quantize", KEY) == second


def test_a_manifest_with_a_cut_blob_is_not_found(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "one", {"a": b"whole"})
    path = store.cache.path(blob_key(manifest["a"].sha256))
    path.chmod(0o644)
    path.write_bytes(b"who")
    assert store.manifest("quantize", KEY) is None
    assert not store.has_blob(manifest["a"])
    with pytest.raises(StoreError, match="has lost a"):
        store.read_blob(manifest["a"])


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"\xff", b'{"digest": "x", "files": []}'])
def test_a_corrupt_manifest_is_an_error_and_not_a_miss(store: Store, tmp_path: Path, damage: bytes) -> None:
    kept(store, tmp_path / "work", FILES)
    store.backend.write(f"artifacts/quantize/{KEY}", damage)
    with pytest.raises(StoreError, match="manifest in the store"):
        store.manifest("quantize", KEY)


@pytest.mark.parametrize("damage", [b'{"seconds": ', b"[]", b"\xff", b"[" * 100_000])
def test_a_corrupt_record_costs_the_record_and_not_the_artifact(store: Store, tmp_path: Path, damage: bytes) -> None:
    kept(store, tmp_path / "work", FILES)
    store.backend.write(f"provenance/quantize/{KEY}", damage)
    assert store.provenance("quantize", KEY) == StageRecord()
    assert [entry.provenance for entry in read_catalog(store).entries.values()] == [StageRecord()]
    assert store.manifest("quantize", KEY) is not None


def test_the_list_of_artifacts_leaves_out_what_cannot_be_read(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "one", {"a": b"1"})
    kept(store, tmp_path / "two", {"a": b"2"}, "b" * 64)
    store.backend.write(f"artifacts/quantize/{'b' * 64}", b"{")
    catalog = read_catalog(store)
    assert [(e.stage, e.key, e.manifest) for e in catalog.entries.values()] == [("quantize", KEY, manifest)]
    assert "cannot be read" in catalog.damaged["quantize", "b" * 64]


def test_16_threads_can_put_one_blob(store: Store, tmp_path: Path) -> None:
    data = b"the same bytes" * 10_000
    file = File("x", len(data), hashlib.sha256(data).hexdigest())
    start, errors = threading.Barrier(16), []

    def work(number: int) -> None:
        path = tmp_path / f"copy{number}"
        path.write_bytes(data)
        start.wait()
        try:
            store.put_blob(path, file)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and store.read_blob(file) == data
    assert [p.name for p in store.cache.root.rglob("*") if p.is_file()] == [file.sha256]


def test_16_threads_can_fetch_one_blob(far: Store, remote: Remote, tmp_path: Path) -> None:
    data = b"weights" * 10_000
    file = File("x", len(data), hashlib.sha256(data).hexdigest())
    remote.write(blob_key(file.sha256), data)
    start, read = threading.Barrier(16), []

    def work() -> None:
        start.wait()
        read.append(far.read_blob(file))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [data] * 16
    assert not list((far.cache.root / "arriving").iterdir())


def test_a_file_that_changed_while_it_was_stored_is_refused(store: Store, tmp_path: Path) -> None:
    (file,) = write_files(tmp_path, {"a": b"hashed"})
    (tmp_path / "a").write_bytes(b"hashed and then grown")
    with pytest.raises(CorruptBlob, match="changed while it was being stored"):
        store.put_blob(tmp_path / "a", file)
    assert not store.has_blob(file)


@pytest.mark.parametrize("where", ["store", "far"])
def test_what_is_handed_out_is_read_only(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A writable link to a blob would let any tool that edits its input damage the store."""
    opened: Store = request.getfixturevalue(where)
    manifest = kept(opened, tmp_path / "work", FILES)
    folder = opened.link_files(manifest, tmp_path / "out")
    for name, data in FILES.items():
        assert (folder / name).read_bytes() == data
        assert (folder / name).stat().st_mode & 0o777 == 0o444


def test_only_what_is_asked_for_is_handed_out(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "work", FILES)
    store.link_files(manifest, tmp_path / "out", ["config.json"])
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["config.json"]


def test_a_file_cut_by_a_crash_is_handed_out_again(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "work", FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes(b"{")
    store.link_files(manifest, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("where", ["store", "far"])
def test_a_checkout_is_writable_and_independent(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    opened: Store = request.getfixturevalue(where)
    manifest = kept(opened, tmp_path / "work", FILES)
    folder = opened.checkout(manifest, tmp_path / "out")
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES
    for name in FILES:
        with (folder / name).open("r+b") as stream:
            stream.write(b"edited by the user")
    assert {f.path: opened.read_blob(f) for f in manifest.files} == FILES
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(FILES)


def test_a_checkout_repairs_what_was_edited_and_keeps_what_is_the_same(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "work", FILES)
    folder = store.checkout(manifest, tmp_path / "out")
    (folder / "config.json").write_bytes(b"[]")  # of the same size
    before = (folder / "sub/weights.safetensors").stat().st_mtime_ns
    store.checkout(manifest, folder)
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "sub/weights.safetensors").stat().st_mtime_ns == before


def test_a_checkout_leaves_nothing_else_behind_whether_it_fails_or_was_killed_before(
    store: Store, tmp_path: Path
) -> None:
    manifest = kept(store, tmp_path / "work", {"a": b"1", "b": b"2"})
    out = tmp_path / "out"
    out.mkdir()
    (out / ".a.part").write_bytes(b"half")
    (out / "b").mkdir()
    with pytest.raises(OSError, match="directory"):
        store.checkout(manifest, out)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"] and (out / "a").read_bytes() == b"1"


def test_a_checkout_over_links_to_blobs_gives_the_user_files_of_their_own(store: Store, tmp_path: Path) -> None:
    manifest = kept(store, tmp_path / "work", {"a": b"blob"})
    store.link_files(manifest, tmp_path / "out")
    store.checkout(manifest, tmp_path / "out")
    assert (tmp_path / "out" / "a").stat().st_mode & 0o200
    assert (tmp_path / "out" / "a").stat().st_ino != store.cache.path(blob_key(manifest["a"].sha256)).stat().st_ino


@pytest.mark.parametrize("altered", [b"WEIGHTS", b"weight", b"", b"weights and more"])
def test_a_blob_altered_on_the_way_in_is_refused_and_not_kept(far: Store, remote: Remote, altered: bytes) -> None:
    file = File("w", 7, hashlib.sha256(b"weights").hexdigest())
    remote.write(blob_key(file.sha256), b"weights")
    remote.on_the_way = lambda data: altered
    with pytest.raises(CorruptBlob, match="does not have the sha256"):
        far.read_blob(file)
    assert [p for p in far.cache.root.rglob("*") if p.is_file()] == []
    remote.on_the_way = bytes
    assert far.read_blob(file) == b"weights"


def test_a_small_blob_that_a_disk_altered_is_never_read(store: Store, far: Store, tmp_path: Path) -> None:
    for each in (store, far):
        manifest = kept(each, tmp_path / "work", {"a": b"right"})
        path = each.cache.path(blob_key(manifest["a"].sha256))
        path.chmod(0o644)
        path.write_bytes(b"wrong")
    assert far.read_blob(manifest["a"]) == b"right"  # fetched anew
    with pytest.raises(CorruptBlob, match="store verify --deep --repair"):
        store.read_blob(manifest["a"])


def test_a_blob_is_fetched_from_far_once(far: Store, remote: Remote) -> None:
    file = File("w", 7, hashlib.sha256(b"weights").hexdigest())
    remote.write(blob_key(file.sha256), b"weights")
    assert far.read_blob(file) == far.read_blob(file) == b"weights"
    assert len(remote.fetched) == 1


def test_a_blob_is_put_far_and_near(far: Store, remote: Remote, tmp_path: Path) -> None:
    manifest = kept(far, tmp_path / "work", {"a": b"1"})
    assert remote.read(blob_key(manifest["a"].sha256)) == b"1"
    assert far.read_blob(manifest["a"]) == b"1" and remote.fetched == []


def test_a_manifest_is_looked_for_where_the_store_is_and_not_near(far: Store, remote: Remote, tmp_path: Path) -> None:
    manifest = kept(far, tmp_path / "work", {"a": b"1"})
    remote.delete(blob_key(manifest["a"].sha256))
    assert far.manifest("quantize", KEY) is None


@pytest.mark.parametrize("name", ["", "abc", "../../etc/passwd", "A" * 64, "g" * 64, "a" * 65, f"{'a' * 64}\n"])
def test_a_name_that_is_no_sha256_never_becomes_a_path(name: str) -> None:
    with pytest.raises(StoreError, match="not a sha256"):
        blob_key(name)


def test_a_work_folder_is_the_same_for_one_key_and_stays_inside(store: Store) -> None:
    first = store.work_folder("quantize", KEY)
    assert first.is_dir() and first == store.work_folder("quantize", KEY) != store.work_folder("validate", KEY)
    assert first.is_relative_to(store.cache.root)
    with pytest.raises(ValueError, match="not allowed"):
        store.work_folder("..", "x")


def test_small_facts_are_remembered(store: Store) -> None:
    assert store.get_fact("git-blobs", "0" * 40) is None
    store.put_fact("git-blobs", "0" * 40, KEY)
    assert store.get_fact("git-blobs", "0" * 40) == KEY


def test_a_local_store_is_opened_from_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_store((tmp_path / "s").as_uri())
    assert opened.is_local and opened.url == (tmp_path / "s").as_uri()
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "t").as_uri())
    assert open_store().url == (tmp_path / "t").as_uri()
    monkeypatch.delenv("REQUANT_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_store().url == (tmp_path / "requant" / "store").as_uri()


def test_a_folder_with_a_space_in_its_name_is_the_folder_that_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "my store ü"
    opened = open_store(folder.as_uri())
    opened.check()
    assert folder.is_dir()
    assert opened.url == folder.as_uri()


def test_an_address_that_would_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://bucket/a?b", "s3://bucket/a#b", "file:///data/a#b"):
        with pytest.raises(RecipeError, match=r"the address .* have no place in it"):
            open_store(url)
        monkeypatch.setenv("REQUANT_STORE", url)
        with pytest.raises(RecipeError, match=r"REQUANT_STORE=.* have no place in it"):
            open_store()


def test_a_store_may_be_named_by_the_path_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a store? #1 %20"
    monkeypatch.setenv("REQUANT_STORE", str(folder))
    assert open_store().url == open_store(folder.as_uri()).url and open_store().cache.root == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/store").cache.root == tmp_path / "store"
    with pytest.raises(RecipeError, match="there is no such user"):
        open_store("~nobody-of-this-name/store")


@pytest.mark.parametrize(
    "url",
    [
        "a/folder",
        "./folder",
        "file://",
        "file://host/dir",
        "s3://",
        "http://x/y",
        "memory://",
        "s3:/b/p",
        "s3://b/a/../c",
        "s3://b/a//c",
    ],
)
def test_an_address_that_is_no_store_is_a_recipe_error_that_says_what_is(url: str) -> None:
    with pytest.raises(RecipeError, match="use an absolute path of a folder, file:///folder or s3://bucket/prefix"):
        open_store(url)
