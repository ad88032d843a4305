"""Every operation on S3 and the Hub under every fault ends in success or in one sentence. `pytest -s` shows which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from infra.hub.launch import HubStandIn
from tests.factories.fault_proxy import KINDS
from tests.factories.paths import ROOT

S3 = ("put small", "put new", "put file", "put parts", "complete", "get small", "get file", "head", "list", "delete")
HUB = ("tree", "download", "resume", "upload", "commit")
CASES = [(name, fault) for fault in (*KINDS, "503 for ever", "skew") for name in S3]
CASES += [(name, fault) for fault in KINDS for name in HUB]
SENTENCES = {  # of what no repetition mends
    **{(name, "403"): "refuses these credentials" for name in S3},
    **{(name, "403"): "this account may not do that" for name in HUB},
    **{(name, "503 for ever"): "answers 503" for name in S3},
    **{(name, "skew"): "clocks" for name in S3},
    ("upload", "flip"): "Received",
    ("commit", "twice"): "was changed by someone else meanwhile",
}
Matrix = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def matrix(ceph: dict[str, str], hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    servers = {"REQUANT_FAULTS_S3": ceph["AWS_ENDPOINT_URL_S3"], "REQUANT_FAULTS_HUB": hub.url}
    environment = {**os.environ, **ceph, "HF_TOKEN": hub.token, **servers}
    command = [sys.executable, "-m", "tests.factories.fault_cases", str(tmp_path_factory.mktemp("faults"))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: Matrix = {(each["operation"], each["fault"]): each for each in json.loads(done.stdout)}
    assert set(outcomes) == set(CASES)
    for (name, fault), each in sorted(outcomes.items()):
        print(f"| {name} | {fault} | {each['result']} | {each['struck']} | {each['calls']} | {each['seconds']} |")
    return outcomes


@pytest.mark.parametrize(("operation", "fault"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_an_operation_survives_a_fault_or_says_in_a_sentence_why_not(
    matrix: Matrix, operation: str, fault: str
) -> None:
    outcome = matrix[operation, fault]
    assert outcome["struck"] > 0 or fault == "skew"
    assert outcome["struck"] < 20  # tries are bounded, and there are pauses between them
    sentence = SENTENCES.get((operation, fault))
    if sentence is None:
        assert outcome["result"] == "success"
    else:
        assert sentence in outcome["result"] and "\n" not in outcome["result"]
