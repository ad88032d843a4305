"""Releases through Xet, the way that every user has: the real hf_xet against the stand-in's storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_url

from infra.dev.hub.launch import HubStandIn
from requant.tasks.errors import HubError
from tests.factories.releases import TARGET, Made, made

XORBS = "_xet/.*/xorbs/"


@pytest.fixture(scope="module")
def xet_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path_factory.mktemp("xet") / "hub", xet=True) as hub:
        yield hub


@pytest.fixture
def api(xet_hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """The real client, in a process for which the stand-in is the Hub and Xet is on."""
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for name, value in xet_hub.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", xet_hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{xet_hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    xet_hub.clear_faults()
    xet_hub.reset_traffic()
    api = HfApi(endpoint=xet_hub.url, token=xet_hub.token)
    yield api
    xet_hub.clear_faults()
    api.delete_repo(TARGET, missing_ok=True)


def sent_bytes(hub: HubStandIn, part: str) -> int:
    return sum(one["bytes_in"] for one in hub.traffic() if part in one["path"] and one["status"] == 200)


def published(hub: HubStandIn, one: Made) -> None:
    """Assert that the repo holds every file of a release as it is."""
    for path in one.names - {".gitattributes"}:
        answer = httpx2.get(hf_hub_url(TARGET, path), follow_redirects=True)
        assert answer.status_code == 200 and answer.content == (one.folder / path).read_bytes(), path


def test_a_release_goes_through_xet_and_is_downloaded_by_plain_http(
    api: HfApi, xet_hub: HubStandIn, tmp_path: Path
) -> None:
    first = made(tmp_path / "first", 1)
    first.publish()
    published(xet_hub, first)
    assert sent_bytes(xet_hub, "/xorbs/") > 0 and sent_bytes(xet_hub, "/_lfs/") == 0


def test_a_release_that_differs_little_sends_little(api: HfApi, xet_hub: HubStandIn, tmp_path: Path) -> None:
    first = made(tmp_path / "first", 1, files={"large.safetensors": bytes(range(256)) * 40_000})
    first.publish()
    before = sent_bytes(xet_hub, "/xorbs/")
    xet_hub.reset_traffic()
    second = made(tmp_path / "second", 2, files={"large.safetensors": bytes(range(256)) * 40_000 + b"more"})
    second.publish()
    published(xet_hub, second)
    weights = sum(file.size for file in second.manifest.files if file.path.endswith(".safetensors"))
    assert before > 0 and sent_bytes(xet_hub, "/xorbs/") < weights / 2


@pytest.mark.parametrize(
    "fault",
    [
        {"path_regex": "xet-write-token", "status": 500, "times": 1},
        {"path_regex": XORBS, "method": "POST", "status": 503, "times": 2},
        {"path_regex": XORBS, "method": "POST", "cut_request_after_bytes": 1000, "times": 1},
        {"path_regex": "_xet/.*shards", "method": "POST", "status": 503, "times": 1},
    ],
    ids=["token", "busy", "cut", "shard"],
)
def test_what_fails_for_a_moment_is_sent_again(
    fault: dict[str, object], api: HfApi, xet_hub: HubStandIn, tmp_path: Path
) -> None:
    one = made(tmp_path / "made", 3)
    xet_hub.fault(**fault)  # type: ignore[arg-type]
    one.publish()
    published(xet_hub, one)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        (XORBS, 403, "the Hub's Xet storage refuses"),
        ("xet-write-token", 403, "this account may not upload to me/released (403)"),
        ("xet-write-token", 404, "HF_HUB_DISABLE_XET=1 uploads without Xet"),
    ],
)
def test_a_refusal_is_one_sentence_and_the_next_run_goes_on(
    path: str, status: int, words: str, api: HfApi, xet_hub: HubStandIn, tmp_path: Path
) -> None:
    one = made(tmp_path / "made", 4)
    xet_hub.fault(path, status=status, times=None)
    with pytest.raises(HubError) as caught:
        one.publish()
    assert words in str(caught.value) and not caught.value.retryable and "\n" not in str(caught.value)
    assert not api.repo_exists(TARGET) or not [f for f in api.list_repo_files(TARGET) if f.endswith(".safetensors")]
    xet_hub.clear_faults()
    one.publish()
    published(xet_hub, one)
