"""Which files of a revision are fetched, and how a data set is named."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from requant.tasks.errors import HubUnavailable
from requant.tasks.hub import revision
from requant.tasks.hub.revision import COMMIT, HubFile, Revision, resolve

SHA = "0123456789abcdef0123456789abcdef01234567"


def wanted(*paths: str) -> list[str]:
    return [f.path for f in Revision("a/b", SHA, tuple(HubFile(p, 1, "b", None) for p in paths)).wanted]


@pytest.mark.parametrize("path", [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "sub/model.bin", "model.pt", "model.pth", "x.ckpt",
    "x.pkl", "x.pickle", "tf_model.h5", "flax_model.msgpack", "q4.gguf", "model.onnx", "onnx/model.onnx_data", "x.npz",
    "x.npy", "consolidated.safetensors", "consolidated-00001.safetensors", "original/params.json", "training_args.bin",
])  # fmt: skip
def test_a_pickle_or_another_frameworks_weights_are_never_fetched(path: str) -> None:
    assert wanted(path, "config.json") == ["config.json"]


@pytest.mark.parametrize("path", [
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
    "README.md", "tokenizer.json", "merges.txt", "chat_template.jinja", "modeling_x.py", "preprocessor_config.json",
    "sub/config.json",
])  # fmt: skip
def test_a_checkpoints_files_are_fetched(path: str) -> None:
    assert wanted(path) == [path]


def test_a_revision_is_named_by_repo_and_commit() -> None:
    assert Revision("a/b", SHA, ()).name == f"a/b@{SHA}"


@pytest.mark.parametrize("text", ["main", SHA[:39], SHA + "0", SHA.upper(), SHA + "\n", ""])
def test_a_branch_is_not_a_commit(text: str) -> None:
    assert COMMIT.fullmatch(text) is None


def test_a_hub_that_takes_a_request_and_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(HubUnavailable, match="did not answer"):
            resolve("a/b")
