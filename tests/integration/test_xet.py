"""Releases through Xet, as a user's are: the real client against the stand-in's storage."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils._xet import abort_xet_session

from infra.dev.hub.launch import HubStandIn
from requant.tasks.errors import HubError
from requant.tasks.hub.revision import resolve
from tests.factories.releases import TARGET, Made, made

ROOT = Path(__file__).parents[2]
UPLOAD = """
import sys
from requant.tasks.hub.client import hub_api
hub_api().upload_file(path_or_fileobj=sys.argv[1], path_in_repo="model.safetensors", repo_id=sys.argv[2])
"""
SHARD = "model-00001-of-00002.safetensors"
XORB_BYTES = 64 << 20  # what hf_xet sends at once


@pytest.fixture(autouse=True)
def xet(hub: HubStandIn, hub_here: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process uses Xet, with a cache of its own and without its pauses of 3 to 48 s."""
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for name, value in {
        "CLIENT_RETRY_BASE_DELAY": "10ms",
        "CACHE": str(tmp_path / "xet"),
        "TELEMETRY_ENABLED": "0",
    }.items():
        monkeypatch.setenv(f"HF_XET_{name}", value)
    abort_xet_session()  # the next one reads these
    hub.reset_traffic()
    yield
    abort_xet_session()
    hub.clear_faults()
    hub.set_xet()


@pytest.fixture
def release(tmp_path: Path) -> Made:
    """A release that no other test has uploaded."""
    return made(tmp_path / "release", int.from_bytes(os.urandom(3)))


def sent(hub: HubStandIn) -> list[int]:
    """The bytes of each xorb that arrived."""
    return [e["bytes_in"] for e in hub.traffic() if "/_cas/v1/xorbs/" in e["path"] and e["status"] == 200]


def asked(hub: HubStandIn, part: str) -> list[str]:
    return [e["path"] for e in hub.traffic() if part in e["path"]]


def test_a_release_arrives_through_xet_and_is_served_to_who_has_none(
    api: HfApi, hub: HubStandIn, release: Made
) -> None:
    assert release.publish().changed
    assert sum(sent(hub)) > 0 and not asked(hub, "/_lfs/") and not asked(hub, "telemetry")
    for file in release.manifest.files:
        plain = httpx2.get(
            f"{hub.url}/{TARGET}/resolve/main/{file.path}", headers={"Authorization": f"Bearer {hub.token}"}
        )
        assert plain.content == (release.folder / file.path).read_bytes()
    with_xet = Path(api.hf_hub_download(TARGET, SHARD, cache_dir=release.folder.parent / "cache"))
    assert with_xet.read_bytes() == (release.folder / SHARD).read_bytes()
    assert asked(hub, "/_cas/v1/reconstructions/")


def refuse(status: int, times: int | None = None, path: str = "_cas/v1/xorbs/") -> Callable[[HubStandIn], None]:
    return lambda hub: hub.fault(path, method="POST" if "_cas" in path else "GET", status=status, times=times)


def lose(times: int | None) -> Callable[[HubStandIn], None]:
    return lambda hub: hub.fault("_cas/v1/xorbs/", cut_request_after_bytes=1, times=times)


FAILURES: dict[str, tuple[Callable[[HubStandIn], None], bool, str]] = {
    "no Xet": (lambda hub: hub.set_xet(enabled=False), False, "set HF_HUB_DISABLE_XET=1"),
    "no token": (refuse(403, path="xet-write-token"), False, "write access"),
    "blocked": (lambda hub: hub.set_xet(cas_url="http://127.0.0.1:9"), True, "set HF_HUB_DISABLE_XET=1"),
    "expired token": (lambda hub: hub.set_xet(token_lifetime_s=0), True, "clock"),
    "forbidden": (refuse(403), False, "(403)"),
    "too large": (refuse(413), False, "(413)"),
    "too many requests": (refuse(429), True, "answers 429"),
    "broken": (refuse(500), True, "answers 500"),
    "busy": (refuse(503), True, "answers 503"),
    "shard refused": (refuse(403, path="_cas/v1/shards"), False, "(403)"),
    "always lost": (lose(None), True, "try again later"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_of_xet_is_a_sentence_and_the_next_call_goes_on(
    failure: str, api: HfApi, hub: HubStandIn, release: Made
) -> None:
    cause, retryable, words = FAILURES[failure]
    cause(hub)
    with pytest.raises(HubError) as caught:
        release.publish()
    sentence = str(caught.value)
    assert words in sentence and caught.value.retryable is retryable, sentence
    assert "\n" not in sentence and "/v1/" not in sentence and hub.token not in sentence
    assert [file.path for file in resolve(TARGET).files] == [".gitattributes"]
    hub.clear_faults()
    hub.set_xet()
    assert release.publish().changed


@pytest.mark.parametrize("cause", [refuse(503, times=2), lose(1)], ids=["busy", "lost"])
def test_what_passes_is_not_seen(
    cause: Callable[[HubStandIn], None], api: HfApi, hub: HubStandIn, release: Made
) -> None:
    cause(hub)
    assert release.publish().changed


def test_a_user_without_xet_uploads_as_before(
    api: HfApi, hub: HubStandIn, release: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.set_xet(enabled=False)
    assert release.publish().changed
    assert asked(hub, "/_lfs/") and not asked(hub, "/_cas/")


def test_what_was_altered_on_its_way_never_becomes_main(api: HfApi, hub: HubStandIn, release: Made) -> None:
    hub.fault("_cas/v1/xorbs/", corrupt=True)
    with pytest.raises(HubError):
        release.publish()
    assert [file.path for file in resolve(TARGET).files] == [".gitattributes"]


def test_after_a_kill_and_for_a_changed_file_only_what_is_missing_is_sent(
    api: HfApi, hub: HubStandIn, tmp_path: Path
) -> None:
    api.create_repo(TARGET)
    path = tmp_path / "model.safetensors"
    weights = bytearray(os.urandom(XORB_BYTES + (8 << 20)))
    path.write_bytes(weights)

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, **hub.env, "HF_XET_DATA_SESSION_XORB_METADATA_FLUSH_INTERVAL": "10ms"}
        environment.pop("HF_HUB_DISABLE_XET", None)
        command = [sys.executable, "-c", UPLOAD, str(path), TARGET]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    hub.fault("_cas/v1/xorbs/", skip=1, times=None, hold_request=True)
    killed = start()
    deadline = time.monotonic() + 60
    while not (sent(hub) and list((tmp_path / "xet").glob("*/staging/*/xorb_metadata/*.mdb"))):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    first = sum(sent(hub))
    hub.clear_faults()
    hub.reset_traffic()
    assert start().wait(60) == 0
    assert first + sum(sent(hub)) < len(weights) * 1.01

    hub.reset_traffic()
    weights[1000:1010] = b"0123456789"
    path.write_bytes(weights)
    assert start().wait(60) == 0
    assert 0 < sum(sent(hub)) < 1 << 20
    plain = httpx2.get(f"{hub.url}/{TARGET}/resolve/main/{path.name}", headers={"Authorization": f"Bearer {hub.token}"})
    assert plain.content == weights
