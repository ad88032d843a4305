"""The files for running Requant in containers, checked without any: schemas, paths, commands, flags, settings."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prefect.cli import app as prefect
from prefect.server.schemas.actions import validate_base_job_template
from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields
from prefect.utilities.templating import apply_values, find_placeholders

from infra.kubernetes.__main__ import POOLS, base_job_template
from requant.flows.cli.main import cli as requant
from requant.tasks.errors import SECRET_VARIABLES
from tests.factories.paths import ROOT

COMPOSE_TEXT = (ROOT / "infra" / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = {path.name: path.read_text() for path in (ROOT / "infra" / "images").glob("*.Dockerfile")}
RUN = {
    "name": "run-1",
    "labels": {"a": "b"},
    "annotations": {},
    "command": ["prefect"],
    "env": [{"name": "X", "value": "1"}],
}
KUBERNETES = "1.31"


def test_the_compose_file_is_one_by_the_specification() -> None:
    schema = json.loads((ROOT / "tests" / "compose_spec" / "compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema, jsonschema.Draft7Validator)


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_refers_to_is_there(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("depends_on", ())) <= set(SERVICES)
    for volume in service.get("volumes", ()):
        assert volume.split(":")[0] in COMPOSE["volumes"]
    if "build" in service:
        context = (ROOT / "infra" / service["build"]["context"]).resolve()
        assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
    for published in service.get("ports", ()):
        assert published.startswith("127.0.0.1:")


def test_a_service_whose_end_is_waited_for_ends_by_itself_and_others_come_back() -> None:
    once = {name for each in SERVICES.values() for name, how in (each.get("depends_on") or {}).items()
            if how["condition"] == "service_completed_successfully"}  # fmt: skip
    assert once == {"deploy"}
    assert {name for name, each in SERVICES.items() if each.get("restart") != "unless-stopped"} == once
    healthy = {name for each in SERVICES.values() for name, how in (each.get("depends_on") or {}).items()
               if how["condition"] == "service_healthy"}  # fmt: skip
    assert all("healthcheck" in SERVICES[name] for name in healthy)


def test_no_secret_stands_in_the_file_and_each_value_is_in_the_example() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if name in SECRET_VARIABLES or re.search("SECRET|PASSWORD|TOKEN|KEY|AUTH", name):
                assert re.fullmatch(r"\$\{[A-Z_0-9]+:\?\}", value), name
    asked = set(re.findall(r"\$\{([A-Z_0-9]+)", COMPOSE_TEXT))
    example = (ROOT / "infra" / "compose.env.example").read_text()
    assert set(re.findall(r"^([A-Z_0-9]+)=$", example, re.MULTILINE)) == asked
    assert not re.search(r"^[A-Z_0-9]+=.+$", example, re.MULTILINE)


def test_only_who_needs_a_secret_has_it() -> None:
    has = {
        name: {each for each, s in SERVICES.items() if name in s.get("environment", {})} for name in SECRET_VARIABLES
    }
    workers = {"worker-cpu", "worker-gpu-0", "webhook"}
    assert has["HF_TOKEN"] == has["AWS_SECRET_ACCESS_KEY"] == workers
    assert has["REQUANT_WEBHOOK_SECRET"] == {"webhook"} and has["PREFECT_SERVER_API_AUTH_STRING"] == {"prefect"}
    assert has["PREFECT_API_AUTH_STRING"] == {*workers, "deploy"}


def test_every_setting_of_prefect_is_one() -> None:
    known = _get_settings_fields(Settings)
    named = {name for s in SERVICES.values() for name in s.get("environment", {}) if name.startswith("PREFECT_")}
    named |= set(re.findall(r"\b(PREFECT_\w+)=", "".join(DOCKERFILES.values())))
    assert len(named) >= 8 and named <= set(known), named - set(known)


@functools.cache
def help_of(*command: str) -> str:
    programs: dict[str, Callable[[], Any]] = {"prefect": prefect, "requant": requant}
    with (
        mock.patch.dict(os.environ, COLUMNS="200"),
        mock.patch.object(sys, "argv", [*command, "--help"]),
        contextlib.redirect_stdout(io.StringIO()) as written,
        pytest.raises(SystemExit) as done,
    ):
        programs[command[0]]()
    assert not done.value.code
    return written.getvalue()


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "command" in service])
def test_every_command_and_flag_of_a_service_exists(name: str) -> None:
    command = SERVICES[name]["command"]
    words = command[:2] if command[0] == "requant" else command[:3]
    text = help_of(*words)
    for flag in (word for word in command[len(words) :] if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag
    for path in (word for word in command if word.startswith("deployments")):
        assert (ROOT / path).exists()


def test_a_gpu_has_one_worker_with_one_run_at_a_time() -> None:
    workers = [s for s in SERVICES.values() if "gpu" in s.get("command", ())]
    taken = []
    for worker in workers:
        command = worker["command"]
        assert command[command.index("--limit") + 1] == "1"
        (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
        taken += device["device_ids"]
    assert taken == [str(number) for number in range(len(workers))]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_is_there_and_whole(name: str) -> None:
    copied = [words.split() for words in re.findall(r"^COPY (.+)$", DOCKERFILES[name], re.MULTILINE)]
    sources = {source for *some, _ in copied for source in some}
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in sources:
        assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, pattern) for pattern in allowed)
    assert {"requant", "flows", "tasks", "infra", "deployments"} <= sources
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_the_gpu_image_has_the_vllm_that_is_tested() -> None:
    script = (ROOT / "infra" / "dev" / "engines" / "install").read_text()
    tested = re.search(r"^version=\$\{VLLM_VERSION:-([\d.]+)\}$", script, re.MULTILINE)
    assert tested is not None and f"ARG VLLM={tested[1]}\n" in DOCKERFILES["gpu.Dockerfile"]


@functools.cache
def job(pool: str) -> dict[str, Any]:
    """The job of a run with the pool's defaults, as Prefect's worker fills the template in."""
    template = base_job_template(pool)
    defaults = {
        name: each["default"] for name, each in template["variables"]["properties"].items() if "default" in each
    }
    manifest: dict[str, Any] = apply_values(template["job_configuration"]["job_manifest"], {**defaults, **RUN})
    return manifest


@pytest.mark.parametrize("pool", POOLS)
def test_a_base_job_template_is_one_by_prefects_own_check(pool: str) -> None:
    template = base_job_template(pool)
    validate_base_job_template(template)
    used = {placeholder.name for placeholder in find_placeholders(template["job_configuration"])}
    assert used == set(template["variables"]["properties"])
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    for name, each in template["variables"]["properties"].items():
        if "default" in each:
            jsonschema.validate(each["default"], {k: v for k, v in each.items() if k != "title"})
        else:
            assert name in RUN


@pytest.mark.parametrize("pool", POOLS)
def test_a_job_is_one_by_the_schema_of_kubernetes(pool: str) -> None:
    made = json.loads(json.dumps(job(pool)))
    spec = made["spec"]["template"]["spec"]
    assert (spec.pop("parallelism"), spec.pop("completions")) == (1, 1)  # asked for by Prefect's worker only
    kubernetes_validate.validate(made, KUBERNETES, strict=True)
    assert "{{" not in json.dumps(made)


def test_a_gpu_job_has_one_gpu_shared_memory_and_a_work_folder() -> None:
    spec = job("gpu")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/work"]]
    assert "nvidia.com/gpu" not in json.dumps(job("cpu"))


def test_the_images_keep_what_must_last_in_the_work_folder() -> None:
    for text in DOCKERFILES.values():
        assert "XDG_CACHE_HOME=/work/" in text and "\nVOLUME /work" in text and "\nUSER requant\n" in text
    assert "work:/work" in SERVICES["worker-cpu"]["volumes"] and "work:/work" in SERVICES["worker-gpu-0"]["volumes"]
