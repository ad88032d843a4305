"""The services of make up: what is written where."""

from __future__ import annotations

import configparser
import stat
from pathlib import Path

from infra.dev.stack.services import configuration, services
from infra.dev.stack.settings import Settings


def test_ports_and_secrets_are_made_once_and_seen_by_no_one_else(tmp_path: Path) -> None:
    settings = Settings.of(tmp_path / "stack")
    assert Settings.of(tmp_path / "stack") == settings
    for name in ("stack.json", settings.write_environment().name):
        assert stat.S_IMODE((tmp_path / "stack" / name).stat().st_mode) == 0o600
    assert len(set(settings.ports.values())) == len(settings.ports)


def test_no_secret_stands_in_the_supervisors_file_but_the_stand_ins_token(tmp_path: Path) -> None:
    settings = Settings.of(tmp_path / "a folder, 100 % odd")
    text = configuration(settings, services(settings))
    assert settings.password not in text
    parser = configparser.ConfigParser()
    parser.read_string(text)
    assert [name for name in parser.sections() if name.startswith("program:")] == [
        f"program:{service.name}" for service in services(settings)
    ]
    assert "100 % odd" in parser["program:hub"]["command"]


def test_each_gpu_has_a_worker_of_its_own_that_takes_one_run_at_a_time(tmp_path: Path) -> None:
    workers = [s for s in services(Settings.of(tmp_path), gpus=3) if s.name.startswith("worker-gpu")]
    assert [worker.command[1] for worker in workers] == [f"CUDA_VISIBLE_DEVICES={index}" for index in range(3)]
    assert all(worker.command[-2:] == ["--limit", "1"] for worker in workers)
