"""Repos looked at through Range requests, and heads fetched without the rest: `inspect` and `mtp-fix --base`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from infra.dev.hub.launch import HubStandIn
from requant.flows import api
from requant.tasks import excerpt
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.header import read_header
from requant.tasks.errors import CheckpointError, HubError, HubUnavailable, RecipeError
from requant.tasks.excerpt import text_files
from requant.tasks.hub.revision import resolve
from requant.tasks.hub.sparse_checkout import create_checkout, fill
from requant.tasks.store import open_store
from requant.tasks.texts.rows import read_rows
from requant.tasks.texts.text import Text, find_text
from tests.factories.checkpoints import all_tensors
from tests.factories.paths import TINY
from tests.factories.pico import pico_base
from tests.factories.requant import Requant, store_in

REPO = "demo/tiny"
pytestmark = pytest.mark.usefixtures("hub_here")


@pytest.fixture(scope="module")
def tiny(hub: HubStandIn) -> Path:
    hub.seed(REPO, TINY)
    return TINY


@pytest.fixture
def requant(environment: dict[str, str], tmp_path: Path) -> Requant:
    """`requant` with an empty store."""
    return Requant(tmp_path, {**environment, **store_in(tmp_path)})


def sent(hub: HubStandIn) -> int:
    return sum(exchange["bytes_out"] for exchange in hub.traffic())


def test_a_skeleton_has_every_header_and_hardly_any_data(hub: HubStandIn, tiny: Path, tmp_path: Path) -> None:
    hub.reset_traffic()
    skeleton = Checkpoint.open(create_checkout(resolve(REPO), tmp_path / "skeleton"))
    whole = Checkpoint.open(tiny)
    assert skeleton.problems == [] and skeleton.config == whole.config
    assert {n: (t.dtype, t.shape, t.begin, t.end) for n, t in skeleton.tensors.items()} == {
        n: (t.dtype, t.shape, t.begin, t.end) for n, t in whole.tensors.items()
    }
    assert sent(hub) < 60_000 < whole.nbytes
    for path in tiny.iterdir():
        assert (skeleton.folder / path.name).stat().st_size == path.stat().st_size


def test_a_header_longer_than_the_first_guess_is_fetched_whole(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.tasks.hub.sparse_checkout.FIRST_READ_BYTES", 1000)
    hub.seed("demo/long", pico_base(tmp_path / "base"))
    skeleton = Checkpoint.open(create_checkout(resolve("demo/long"), tmp_path / "skeleton"))
    assert skeleton.problems == [] and len(skeleton.tensors) == len(all_tensors(tmp_path / "base"))


def test_only_the_tensors_asked_for_are_filled_in(
    hub: HubStandIn, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.tasks.hub.sparse_checkout.MAX_GAP_BYTES", 0)
    monkeypatch.setattr("requant.tasks.hub.sparse_checkout.FIRST_READ_BYTES", 1000)
    revision = resolve(REPO)
    skeleton, whole = Checkpoint.open(create_checkout(revision, tmp_path / "skeleton")), Checkpoint.open(tiny)
    assert skeleton.head is not None
    hub.reset_traffic()
    fill(revision, skeleton.folder, [skeleton.tensors[name] for name in skeleton.head.names])
    for name, tensor in whole.tensors.items():
        there = tensor.read() if name in skeleton.head.names else bytes(tensor.nbytes)
        assert skeleton.tensors[name].read() == there
    held = sum(whole.tensors[name].nbytes for name in skeleton.head.names)
    assert held <= sent(hub) < held + 200_000


def test_a_lost_connection_and_server_errors_are_tried_again(hub: HubStandIn, tiny: Path, tmp_path: Path) -> None:
    hub.fault(r"resolve/.*/config\.json", status=503)
    hub.fault(r"resolve/.*index\.json", status=429, retry_after=0)
    assert Checkpoint.open(create_checkout(resolve(REPO), tmp_path / "skeleton")).problems == []


def test_an_answer_cut_short_goes_on_where_it_ended(hub: HubStandIn, tiny: Path, tmp_path: Path) -> None:
    hub.reset_traffic()
    hub.fault(r"resolve/.*00002-of-00002\.safetensors", cut_after_bytes=3000, times=2)
    assert Checkpoint.open(create_checkout(resolve(REPO), tmp_path / "skeleton")).problems == []
    assert sent(hub) < 60_000


def test_answers_that_are_always_cut_are_an_error_and_no_header_of_zeros(
    hub: HubStandIn, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("requant.tasks.hub.sparse_checkout.PAUSES_S", (0, 0))
    hub.fault(r"resolve/.*00002-of-00002\.safetensors", cut_after_bytes=3000, times=None)
    with pytest.raises(HubUnavailable, match="00002-of-00002"):
        create_checkout(resolve(REPO), tmp_path / "skeleton")


def test_an_index_that_is_no_json_is_refused_with_its_name(hub: HubStandIn, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    (base / "model.safetensors.index.json").write_text("{")
    hub.seed("demo/broken", base)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(create_checkout(resolve("demo/broken"), tmp_path / "skeleton"))


def test_a_repo_that_is_not_there_is_a_sentence(requant: Requant) -> None:
    outcome = requant("inspect", "demo/nowhere", "--json")
    assert outcome.status == 1 and "demo/nowhere does not exist" in outcome.document["error"]
    with pytest.raises(HubError):
        resolve("demo/nowhere")


def test_inspect_of_a_repo_says_what_inspect_of_its_folder_says(requant: Requant, tiny: Path) -> None:
    by_hub, by_folder = requant("inspect", REPO, "--json"), requant("inspect", str(tiny), "--json")
    assert by_hub.status == by_folder.status == 0, by_hub.stderr
    assert by_hub.document == by_folder.document
    assert requant("inspect", f"{REPO}@main").status == 0


def test_a_skeleton_has_the_headers_of_shards_that_no_index_names(hub: HubStandIn, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    names = sorted(path.name for path in base.glob("*.safetensors"))
    (base / "model.safetensors.index.json").unlink()
    hub.seed("demo/no-index", base)
    skeleton = create_checkout(resolve("demo/no-index"), tmp_path / "skeleton")
    assert {name for shard in names for name in read_header(skeleton / shard)} == set(all_tensors(base))


def test_inspect_of_a_repo_reads_the_one_file_that_has_all_settings_of_processors(
    hub: HubStandIn, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(tiny, folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text('{"image_processor": {}, "video_processor": {}}')
    hub.seed("demo/one-processor-file", folder)
    by_hub = api.inspect("demo/one-processor-file")
    assert by_hub == api.inspect(folder) and by_hub.problems == []


def test_deep_inspection_of_a_repo_downloads_it(requant: Requant, tiny: Path) -> None:
    outcome = requant("inspect", REPO, "--deep")
    assert outcome.status == 0 and "fetched model-00001" in outcome.stderr


def test_mtp_fix_takes_the_head_of_a_repo_and_nothing_else(
    requant: Requant, hub: HubStandIn, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(tiny, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {shard for name, shard in index["weight_map"].items() if name.startswith("mtp.")}
    head = {name: raw for name, raw in all_tensors(tiny).items() if name.startswith("mtp.")}
    tensor = Checkpoint.open(folder).tensors["mtp.fc.weight"]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.begin)
        stream.write(bytes(100))
    (folder / "tokenizer.json").unlink()
    hub.reset_traffic()
    outcome = requant("mtp-fix", str(folder), "--base", REPO, "--json")
    assert outcome.status == 0, outcome.stderr
    assert outcome.document["changed"] and outcome.document["tensors_restored"] == 1
    assert all_tensors(folder) == all_tensors(tiny)
    assert {n: raw for n, raw in all_tensors(folder).items() if n.startswith("mtp.")} == head
    assert (folder / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    limit = sum(len(raw[2]) for raw in head.values()) + (tiny / "tokenizer.json").stat().st_size + 200_000
    assert sent(hub) < limit and shards


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def seeded(hub: HubStandIn, folder: Path, name: str, table: dict[str, Any], rows: int = 1) -> Text:
    """A data set of one file on the stand-in, as `requant` finds it."""
    folder.mkdir()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({key: [value] * rows for key, value in table.items()}), folder / name)
    else:
        (folder / name).write_text((json.dumps(table) + "\n") * rows)
    hub.seed(f"demo/{folder.name}", folder, repo_type="dataset")
    hub.reset_traffic()
    return find_text(f"demo/{folder.name}")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_the_columns_of_a_data_set_are_known_from_a_few_kilobytes(name: str, hub: HubStandIn, tmp_path: Path) -> None:
    kind = name.rpartition(".")[2]
    chats = seeded(hub, tmp_path / f"chats-{kind}", name, {"messages": CHAT, "id": "x" * 500}, rows=5000)
    assert chats.chats and chats.columns == ("messages", "id") and chats.digest.startswith("chats:dataset:")
    assert sent(hub) < 300_000
    texts = seeded(hub, tmp_path / f"texts-{kind}", name, {"text": "a", "messages": CHAT})
    assert not texts.chats and texts.digest.startswith("dataset:")
    described = tmp_path / f"described-{kind}"
    described.mkdir()
    (described / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (described / name).write_bytes((tmp_path / f"texts-{kind}" / name).read_bytes())
    hub.seed(f"demo/{described.name}", described, repo_type="dataset")
    assert find_text(f"demo/{described.name}").columns == ("text", "messages")
    wrong = seeded(hub, tmp_path / f"wrong-{kind}", name, {"prompt": "a", "answer": "b"})
    assert not wrong.chats and wrong.columns == ("prompt", "answer")


LAYOUTS = {
    "a list": ("train.json", json.dumps([{"messages": CHAT}] * 3)),
    "a pretty list": ("train.json", json.dumps([{"id": 1, "messages": CHAT}] * 3, indent=2)),
    "a long first row": ("train.jsonl", json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}]}) + "\n"),
    "a long row with a text behind": ("train.jsonl", json.dumps({"messages": CHAT * 2000, "text": "a"}) + "\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chats_are_known_in_the_layouts_that_data_sets_have(layout: str, hub: HubStandIn, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    name, content = LAYOUTS[layout]
    folder = tmp_path / layout.replace(" ", "-")
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"features": {}}}, indent=2))
    hub.seed(f"demo/{folder.name}", folder, repo_type="dataset")
    text = find_text(f"demo/{folder.name}")
    assert text.chats == ("text" not in layout)
    assert list(read_rows(text_files(store, text, tmp_path / "out"), text.name, chats=text.chats))


PARQUET_ROWS = 120_000


def test_a_large_data_set_costs_what_is_read_of_it(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of 15 MB, of which a megabyte of text is needed; the second time, nothing."""
    monkeypatch.setattr(excerpt, "MIN_CHARACTERS", 1 << 20)
    folder = tmp_path / "large"
    folder.mkdir()
    lines = [os.urandom(60).hex() for _ in range(PARQUET_ROWS)]
    table = pyarrow.table({"id": range(PARQUET_ROWS), "text": lines, "blob": [b"x" * 900] * PARQUET_ROWS})
    pyarrow.parquet.write_table(table, folder / "train.parquet", use_dictionary=False, row_group_size=PARQUET_ROWS)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    hub.seed("demo/large", folder, repo_type="dataset")
    store = open_store((tmp_path / "store").as_uri())
    for name, file in (("demo/large", "train.parquet"), ("demo/large:test", "test.jsonl")):
        assert (folder / file).stat().st_size > 14_000_000
        hub.reset_traffic()
        rows = list(read_rows(text_files(store, find_text(name), tmp_path / f"out-{file}"), name))
        assert [row.text for row in rows] == lines[: len(rows)] and (1 << 20) // 120 < len(rows) < 10_000
        assert sent(hub) < 3_500_000
        before = sent(hub)
        again = text_files(store, find_text(name), tmp_path / f"again-{file}")
        assert len(list(read_rows(again, name))) == len(rows) and sent(hub) - before < 150_000


def test_a_data_set_is_chosen_by_configuration_and_split_and_pinned_with_them(hub: HubStandIn, tmp_path: Path) -> None:
    folder = tmp_path / "choice"
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps({"body": CHAT, "note": name}).encode()))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    sha = hub.seed("demo/choice", folder, repo_type="dataset")
    store = open_store((tmp_path / "store").as_uri())
    text = find_text("demo/choice:test", field="body")
    assert (text.name, text.license, text.chats) == (f"demo/choice@{sha}:test", "cc0-1.0", True)
    (row,) = read_rows(text_files(store, text, tmp_path / "out"), chats=True, field="body")
    assert [dict(message.fields) for message in row.messages] == CHAT
    assert find_text(text.name, field="body").digest == text.digest != find_text("demo/choice", field="body").digest
    notes = find_text("demo/choice@main", field="note")
    assert not notes.chats and notes.name == f"demo/choice@{sha}"
    with pytest.raises(RecipeError, match=r"demo/choice:dev has no dev: .*its splits are test, train"):
        find_text("demo/choice:dev")
