"""`requant mtp-fix REPO`: repairs of repos on the Hub stand-in, tried and proposed as pull requests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import DiscussionComment, HfApi

import requant
from infra.dev.hub.launch import HubStandIn
from requant.flows.cli.main import cli
from requant.tasks.artifact import File, file_of
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.document import MtpFixDocument
from requant.tasks.errors import CheckpointError, HubError, RecipeError
from requant.tasks.hub.revision import resolve
from tests.factories.checkpoints import all_tensors, raw_tensors, write_checkpoint
from tests.factories.paths import TINY
from tests.factories.pico import pico_base
from tests.factories.repairs import elsewhere, fixed
from tests.factories.requant import Requant, wait_for

BASE = "demo/doctored"
CARD = "---\nlicense: mit\nbase_model: {}\nbase_model_relation: quantized\n---\n# Quantized\n"
pytestmark = pytest.mark.usefixtures("hub_here")


@pytest.fixture(scope="module")
def base(hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_base(tmp_path_factory.mktemp("doctored") / "base")
    for path in TINY.iterdir():
        if path.name != "config.json" and not path.name.startswith("model") and path.suffix != ".md":
            (folder / path.name).write_bytes(path.read_bytes())
    hub.seed(BASE, folder)
    return folder


@pytest.fixture
def broken(base: Path, tmp_path: Path) -> Path:
    """A quantized head of which the configs say nothing, and no tokenizer_config.json."""
    folder = elsewhere(base, tmp_path / "broken", packed=("mtp.fc",))
    (folder / "README.md").write_text(CARD.format(BASE))
    (folder / "tokenizer_config.json").unlink()
    return folder


@pytest.fixture
def repo(hub: HubStandIn, broken: Path, request: pytest.FixtureRequest) -> str:
    """The broken checkpoint as a repo of someone else."""
    repo_id = "them/" + hashlib.sha1(request.node.name.encode()).hexdigest()
    hub.seed(repo_id, broken)
    hub.reset_traffic()
    return repo_id


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


def written(hub: HubStandIn) -> list[str]:
    """The requests that may change something, or prepare that."""
    return [exchange["path"] for exchange in hub.traffic() if exchange["method"] not in ("GET", "HEAD")]


def sent(hub: HubStandIn, way: str = "bytes_out") -> int:
    return sum(int(exchange[way]) for exchange in hub.traffic())  # type: ignore[literal-required]


def download(api: HfApi, repo: str, folder: Path, revision: str = "refs/pr/1") -> Path:
    return Path(api.snapshot_download(repo, revision=revision, local_dir=folder))


def is_untouched(api: HfApi, repo: str, sha: str | None) -> bool:
    return api.model_info(repo).sha == sha and list(api.get_repo_discussions(repo)) == []


def test_a_trial_fetches_headers_and_sends_nothing_even_with_a_token(hub: HubStandIn, api: HfApi, repo: str) -> None:
    sha = api.model_info(repo).sha
    hub.reset_traffic()
    outcome = CliRunner().invoke(cli, ["mtp-fix", repo, "--json"])
    assert outcome.exit_code == 0, outcome.output
    assert written(hub) == [] and sent(hub, "bytes_in") == 0
    document = MtpFixDocument.model_validate(json.loads(outcome.stdout))
    assert sent(hub) < 150_000 < document.download_bytes
    assert (document.repo, document.sha, document.base) == (repo, sha, f"{BASE}@{resolve(BASE).sha}")
    assert not document.changed and document.pull_request is None and document.tensors_restored == 15
    before, after = document.before, document.after
    assert before is not None and after is not None and document.engines == after.engines
    assert [before.engines[engine].mtp for engine in ("vllm", "sglang")] == [False, False]
    assert [after.engines[engine].mtp for engine in ("vllm", "sglang")] == [True, True]
    assert any("mtp.fc.qweight" in problem for problem in before.problems) and "mtp.fc" not in str(after.problems)
    assert set(document.sizes) == set(document.writes) > {"config.json", "model-mtp.safetensors"}
    assert document.upload_bytes == sum(document.sizes.values())
    assert is_untouched(api, repo, sha)


def test_a_pull_request_holds_what_the_trial_and_a_repair_of_the_folder_say(
    hub: HubStandIn, api: HfApi, repo: str, broken: Path, base: Path, tmp_path: Path
) -> None:
    sha = api.model_info(repo).sha
    tried = requant.mtp_fix(repo)
    hub.reset_traffic()
    outcome = CliRunner().invoke(cli, ["mtp-fix", repo, "--pull-request"])
    assert outcome.exit_code == 0 and f"{hub.url}/{repo}/discussions/1" in outcome.stdout
    assert sum("/commit/" in path for path in written(hub)) == 1
    assert sum(path.startswith("/_lfs") and not path.endswith("verify") for path in written(hub)) == 3
    assert api.model_info(repo).sha == sha and tried.after is not None
    proposed = requant.inspect(f"{repo}@refs/pr/1")
    assert (proposed.engines, proposed.problems) == (tried.after.engines, tried.after.problems)
    assert proposed.engines["vllm"].mtp and proposed.engines["sglang"].mtp
    there = download(api, repo, tmp_path / "there")
    assert {path: (there / path).stat().st_size for path in tried.writes} == tried.sizes
    fixed(broken, base)
    names = {path.name for path in broken.iterdir()} | {".gitattributes"}
    assert {path.name for path in there.iterdir() if path.name != ".cache"} == names
    for path in broken.iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes(), path.name
    hub.reset_traffic()
    again = requant.mtp_fix(repo, pull_request=True)
    assert (again.changed, again.pull_request) == (False, f"{hub.url}/{repo}/discussions/1") and written(hub) == []
    assert requant.mtp_fix(f"{repo}@refs/pr/1").writes == []


def test_the_description_has_the_reason_the_verdicts_and_the_pinned_base(api: HfApi, repo: str) -> None:
    requant.mtp_fix(repo, pull_request=True)
    (opened,) = api.get_repo_discussions(repo)
    assert (opened.title, opened.author, opened.status) == ("Repair the checkpoint with requant mtp-fix", "me", "open")
    (comment,) = api.get_discussion_details(repo, 1).events
    assert isinstance(comment, DiscussionComment)
    assert "| vllm | loads, does not draft: mtp.fc.qweight is packed" in comment.content
    assert f"--base {BASE}@{resolve(BASE).sha}" in comment.content


def test_without_a_token_nothing_is_even_asked(
    hub: HubStandIn, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RecipeError, match="--pull-request needs a token"):  # exit status 2
        requant.mtp_fix(repo, pull_request=True)
    assert hub.traffic() == []


def test_a_token_that_may_only_read_is_refused_before_anything_is_fetched(
    hub: HubStandIn, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_token("hf_reader", "reader", role="read")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match="HF_TOKEN may only read"):
        requant.mtp_fix(repo, pull_request=True)
    assert len(hub.traffic()) == 1


def test_a_checkpoint_that_is_fine_gets_no_pull_request(
    hub: HubStandIn, api: HfApi, repo: str, base: Path, tmp_path: Path
) -> None:
    fine = shutil.copytree(base, tmp_path / "fine")
    (fine / "README.md").write_text(CARD.format(BASE))
    hub.seed(repo, fine, delete_missing=True)
    hub.reset_traffic()
    outcome = CliRunner().invoke(cli, ["mtp-fix", repo, "--pull-request"])
    assert outcome.exit_code == 0 and "nothing to repair" in outcome.stdout and written(hub) == []
    assert list(api.get_repo_discussions(repo)) == []
    # Of a file that only the base has no engine and no sentence of inspect says anything.
    (fine / "tokenizer_config.json").unlink()
    hub.seed(repo, fine, delete_missing=True)
    document = requant.mtp_fix(repo, pull_request=True)
    assert (document.writes, document.problems, document.pull_request) == ([], [], None)
    assert list(api.get_repo_discussions(repo)) == []


def test_only_main_gets_a_pull_request_and_only_at_the_commit_that_was_inspected(
    hub: HubStandIn, api: HfApi, repo: str, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = api.model_info(repo).sha
    (broken / "NOTES.txt").write_text("a commit in between")
    with monkeypatch.context() as between:
        between.setattr("requant.tasks.repairing.repo.file_of", lambda *file: _after_a_commit(hub, repo, broken, *file))
        with pytest.raises(HubError, match="was inspected: run again"):
            requant.mtp_fix(repo, pull_request=True)
    with pytest.raises(HubError, match=f"and {old} was inspected"):
        requant.mtp_fix(f"{repo}@{old}", pull_request=True)
    assert list(api.get_repo_discussions(repo)) == []


def _after_a_commit(hub: HubStandIn, repo: str, folder: Path, root: Path, path: str) -> File:
    hub.seed(repo, folder)
    return file_of(root, path)


def test_an_answer_that_was_lost_opens_no_second_pull_request(hub: HubStandIn, api: HfApi, repo: str) -> None:
    hub.fault(f"/{repo}/commit/main", method="POST", cut_after_bytes=0)
    document = requant.mtp_fix(repo, pull_request=True)
    assert document.changed and document.pull_request == f"{hub.url}/{repo}/discussions/1"
    assert [request.num for request in api.get_repo_discussions(repo)] == [1]


def test_an_open_repair_with_other_changes_is_named_and_one_of_others_is_in_nobodys_way(
    hub: HubStandIn, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_token("hf_other", "other")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("HF_TOKEN", "hf_other")
        requant.mtp_fix(repo, precision="int8", pull_request=True)
        with pytest.raises(HubError, match="discussions/1 of other is open with other changes"):
            requant.mtp_fix(repo, pull_request=True)
    document = requant.mtp_fix(repo, pull_request=True)
    assert document.changed and document.pull_request == f"{hub.url}/{repo}/discussions/2"


def test_a_single_file_is_renamed_on_the_hub_and_not_uploaded(
    hub: HubStandIn, api: HfApi, base: Path, repo: str, tmp_path: Path
) -> None:
    folder = elsewhere(base, tmp_path / "single", packed=(), single=True)
    headless = {name: raw for name, raw in all_tensors(folder).items() if not name.startswith("mtp.")}
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(folder, {"model.safetensors": headless}, config, index=False)
    (folder / "README.md").write_text(CARD.format(BASE))
    hub.seed(repo, folder, delete_missing=True)
    hub.reset_traffic()
    document = requant.mtp_fix(repo, pull_request=True)
    assert document.removes == ["model.safetensors"] and document.sizes["model-restored-00001.safetensors"] == 0
    assert sent(hub, "bytes_in") < document.upload_bytes + 20_000 < (folder / "model.safetensors").stat().st_size
    proposed = {file.path: file for file in resolve(repo, "refs/pr/1").files}
    (old,) = [file for file in resolve(repo).files if file.path == "model.safetensors"]
    assert proposed["model-restored-00001.safetensors"].sha256 == old.sha256 and "model.safetensors" not in proposed
    assert requant.inspect(f"{repo}@refs/pr/1").engines["vllm"].mtp


def without_head(folder: Path) -> None:
    shards = {path.name: raw_tensors(path) for path in folder.glob("*.safetensors")}
    kept = {shard: {n: raw for n, raw in held.items() if not n.startswith("mtp.")} for shard, held in shards.items()}
    write_checkpoint(folder, kept, json.loads((folder / "config.json").read_text()))


def without_index(folder: Path) -> None:
    without_head(folder)
    (folder / INDEX).unlink()


def with_an_only_copy_astray(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    named = {name: shard for name, shard in index["weight_map"].items() if shard.startswith("model-00001")}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": named}))


def without_a_word_of_the_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = [without_head, without_index, with_an_only_copy_astray, without_a_word_of_the_head]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_repair_of_every_damage_is_proposed_and_inspects_clean(
    damage: Callable[[Path], None], hub: HubStandIn, api: HfApi, repo: str, broken: Path
) -> None:
    damage(broken)
    hub.seed(repo, broken, delete_missing=True)
    sha = api.model_info(repo).sha
    hub.reset_traffic()
    document = requant.mtp_fix(repo, pull_request=True)
    assert document.changed and document.before is not None and document.after is not None
    assert not all(document.before.engines[engine].mtp for engine in ("vllm", "sglang"))
    proposed = requant.inspect(f"{repo}@refs/pr/1")
    assert proposed.engines["vllm"].mtp and proposed.engines["sglang"].mtp and proposed.mtp.complete
    assert (proposed.engines, proposed.problems) == (document.after.engines, document.after.problems)
    assert [problem for problem in proposed.problems if "config.json says bfloat16" not in problem] == []
    assert api.model_info(repo).sha == sha and INDEX in {file.path for file in resolve(repo, "refs/pr/1").files}
    assert requant.mtp_fix(f"{repo}@refs/pr/1").writes == []


def test_a_base_without_a_head_that_a_card_names_does_not_keep_the_rest_from_repair(
    hub: HubStandIn, repo: str, tmp_path: Path
) -> None:
    headless = pico_base(tmp_path / "headless", head=False)
    hub.seed("demo/headless", headless)
    folder = elsewhere(headless, tmp_path / "made")
    (folder / "README.md").write_text(CARD.format("demo/headless"))
    hub.seed(repo, folder, delete_missing=True)
    whole = requant.mtp_fix(repo)
    assert whole.writes == [] and whole.base is None
    (folder / INDEX).unlink()
    hub.seed(repo, folder, delete_missing=True)
    assert requant.mtp_fix(repo).writes == [INDEX]
    with pytest.raises(CheckpointError, match="has no MTP head"):
        requant.mtp_fix(repo, base="demo/headless")


@pytest.mark.parametrize("named", ["demo/nowhere", "demo/other-size", BASE])
def test_a_base_that_a_card_names_is_a_repo_and_is_left_out_if_it_is_not_the_checkpoints(
    named: str,
    hub: HubStandIn,
    repo: str,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.seed("demo/other-size", TINY)
    (tmp_path / named).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (broken / "README.md").write_text(CARD.format(named))
    hub.seed(repo, broken)
    document = requant.mtp_fix(repo)
    if named == BASE:
        assert document.base == f"{BASE}@{resolve(BASE).sha}"
    else:
        assert (document.base, document.source) == (None, "dequantized") and document.engines["vllm"].mtp
        assert f"the base that the card of {repo}" in caplog.text and "/tmp" not in caplog.text


def test_a_base_that_does_not_fit_is_a_sentence_about_the_two_repos(hub: HubStandIn, repo: str) -> None:
    hub.seed("demo/other-size", TINY)
    with pytest.raises(CheckpointError, match=f"demo/other-size@.* is not the base of {repo}@") as refused:
        requant.mtp_fix(repo, base="demo/other-size")
    assert "/tmp" not in str(refused.value) and "requant-" not in str(refused.value)


def test_the_base_of_a_pull_request_is_one_that_others_can_look_at(
    hub: HubStandIn, api: HfApi, repo: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="is a folder: name the base as repo_id"):
        requant.mtp_fix(repo, base=base, pull_request=True)
    hub.add_token("hf_owner", "demo")
    hub.set_repo(BASE, private=True)
    try:
        with pytest.raises(HubError, match=f"{BASE} does not exist"):
            requant.mtp_fix(repo, base=BASE)
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        assert requant.mtp_fix(repo).tensors_restored == 15
        with pytest.raises(HubError, match=f"{BASE} is private and {repo} is not"):
            requant.mtp_fix(repo, pull_request=True)
    finally:
        hub.set_repo(BASE, private=False)
    assert list(api.get_repo_discussions(repo)) == []


@pytest.mark.parametrize("address", ["whoami", "/discussions", "/commit/main"])
def test_an_answer_that_is_no_answer_is_a_sentence(hub: HubStandIn, api: HfApi, repo: str, address: str) -> None:
    hub.fault(re.escape(address), corrupt=True, **({} if address == "/commit/main" else {"method": "GET"}))
    with pytest.raises(HubError) as refused:
        requant.mtp_fix(repo, pull_request=True)
    assert "\n" not in str(refused.value)


def test_a_killed_upload_leaves_nothing_visible_and_the_next_run_goes_on(
    hub: HubStandIn, api: HfApi, repo: str, tmp_path: Path
) -> None:
    sha = api.model_info(repo).sha
    hub.fault(f"/{repo}/commit/main", method="POST", hold_request=True)
    process = Requant(tmp_path, {**os.environ, **hub.env}).start("mtp-fix", repo, "--pull-request")
    wait_for(lambda: any("/commit/" in path for path in written(hub)), what="the commit", process=process)
    process.kill()
    process.communicate()
    hub.clear_faults()
    assert is_untouched(api, repo, sha)
    hub.reset_traffic()
    assert requant.mtp_fix(repo, pull_request=True).pull_request == f"{hub.url}/{repo}/discussions/1"
    assert not any(path.startswith("/_lfs") for path in written(hub))  # the Hub kept what was uploaded
