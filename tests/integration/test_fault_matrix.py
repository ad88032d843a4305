"""Operations on S3 and the Hub under faults end in success or in one sentence. `pytest -s` shows which.

On every change some of the matrix, by the rule of tests/factories/fault_matrix.py; all of it at night.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from infra.dev.hub.launch import HubStandIn
from tests.factories.asked import asked
from tests.factories.fault_matrix import (
    FOREVER,
    GUARDS,
    HUB_OPERATIONS,
    S3_KINDS,
    S3_OPERATIONS,
    SKEW,
    Case,
    all_cases,
    cases_of_every_change,
    most_dangerous,
)
from tests.factories.fault_proxy import KINDS
from tests.factories.paths import ROOT

SENTENCES = {  # of what no repetition mends
    **{(name, "403"): "refuses these credentials" for name in S3_OPERATIONS},
    **{(name, "403"): "this account may not do that" for name in HUB_OPERATIONS},
    **{(name, FOREVER): "answers 503" for name in S3_OPERATIONS},
    **{(name, SKEW): "clocks" for name in S3_OPERATIONS},
    ("upload", "flip"): "Received",
    ("commit", "twice"): "was changed by someone else meanwhile",
}
OFTEN = cases_of_every_change()
CASES = [
    pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow, id="-".join(case).replace(" ", "-"))
    for case in all_cases()
]
Matrix = dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def matrix(
    request: pytest.FixtureRequest, ceph: dict[str, str], hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory
) -> Matrix:
    """What happened in the cases that this session was asked for."""
    cases = asked(request, "case")
    servers = {"REQUANT_FAULTS_S3": ceph["AWS_ENDPOINT_URL_S3"], "REQUANT_FAULTS_HUB": hub.url}
    environment = {**os.environ, **ceph, "HF_TOKEN": hub.token, **servers}
    folder = str(tmp_path_factory.mktemp("faults"))
    command = [sys.executable, "-m", "tests.factories.fault_cases", folder, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: Matrix = {(each["operation"], each["fault"]): each for each in json.loads(done.stdout)}
    assert set(outcomes) == set(cases)
    for (name, fault), each in sorted(outcomes.items()):
        print(f"| {name} | {fault} | {each['result']} | {each['struck']} | {each['calls']} |")
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_an_operation_survives_a_fault_or_says_in_a_sentence_why_not(matrix: Matrix, case: Case) -> None:
    outcome = matrix[case]
    assert outcome["struck"] > 0 or case[1] == SKEW
    assert outcome["struck"] < 20  # tries are bounded, and there are pauses between them
    assert outcome["calls"] <= 4
    sentence = SENTENCES.get(case)
    if sentence is None:
        assert outcome["result"] == "success"
    else:
        assert sentence in outcome["result"] and "\n" not in outcome["result"]


def test_every_fault_and_every_operation_is_tried_on_every_change() -> None:
    assert set(all_cases()) >= OFTEN >= GUARDS
    for operations, kinds in ((S3_OPERATIONS, S3_KINDS), (HUB_OPERATIONS, KINDS)):
        cases = {(name, kind) for name, kind in OFTEN if name in operations}
        assert {kind for _, kind in cases} == set(kinds)
        for name in operations:
            assert len([kind for each, kind in cases if each == name]) >= 2
            assert (name, most_dangerous(name)) in cases
