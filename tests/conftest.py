"""What all tests share: no settings of the user's own, markers, and how many examples Hypothesis tries."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from requant.tasks.environment import bypass_proxy_on_loopback

# The Hub client reads its variables when it is imported.
for name in list(os.environ):
    ours = name == "REQUANT_VLLM_PYTHON"
    if name.startswith(("HF_", "HUGGING_FACE", "AWS_", "REQUANT_", "PREFECT_")) and not ours:
        del os.environ[name]
bypass_proxy_on_loopback(os.environ)
# Threads of several processes on the same cores wait for each other, and the models here are small: one is faster.
os.environ.update(HF_HUB_DISABLE_XET="1", DO_NOT_TRACK="1", OMP_NUM_THREADS="1")
# Nothing is written into the user's cache, and no process of the tests reads what another one wrote.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="requant-tests-hf-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

for profile, examples in {"few": 25, "many": 400}.items():
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        derandomize=profile == "few",  # what fails in CI fails on every machine
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
settings.load_profile("few")

OF_FOLDERS = {"engines": "engine", "ui": "browser", "gpu": "gpu"}
OF_FIXTURES = {"ceph": "ceph", "stack": "ceph", "as_root": "root"}
# A test that hangs fails by its name. The slowest unit test takes 12 s on a quiet machine, the slowest fixture 100 s.
UNIT_LIMIT_S, LIMIT_S = 120, 300
SLOW_FACTOR = 10  # for tests marked slow, and for all tests with the many Hypothesis examples of the night


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by folder and fixtures, limit their time, and keep those that share costly fixtures in one process."""
    root = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(root).parts[0]
        marks = [OF_FOLDERS[folder]] if folder in OF_FOLDERS else []
        marks += [OF_FIXTURES[name] for name in getattr(item, "fixturenames", ()) if name in OF_FIXTURES]
        for mark in marks:
            item.add_marker(mark)
        if folder != "unit":
            group = "ceph" if "ceph" in marks else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
        limit_s = UNIT_LIMIT_S if folder == "unit" else LIMIT_S
        if item.get_closest_marker("slow") or item.config.getoption("--hypothesis-profile") == "many":
            limit_s *= SLOW_FACTOR
        item.add_marker(pytest.mark.timeout(limit_s))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail if pytest-xdist does not keep groups together: a version that does not would only make the tests slow."""
    grouped = item.get_closest_marker("xdist_group") and item.config.getoption("loadgroup", False)
    assert not grouped or "@" in item.nodeid, "pytest-xdist did not read the groups"


@pytest.fixture
def as_root() -> None:
    """Skip the test unless it runs as root: for what only root may do, as mounting a file system."""
    if os.geteuid() != 0:
        pytest.skip("not root")
