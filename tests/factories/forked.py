"""The servers of forks that tests use: one for commands, one for quantize children.

`python -m tests.factories.forked ADDRESS MODULE ARGUMENTS...` runs a module whose quantize children are forks of the
server at ADDRESS: so a command, which is a fork itself, can have them too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.factories.forks import Fork, Server, run

COMMANDS = Server(
    "boto3",
    "requant.flows.cli.main",
    "requant.flows.embedded",
    "requant.flows.requantize",
    "requant.flows.report.terminal",
    "requant.flows.watch",
    "requant.tasks.evaluate",
    "requant.tasks.plots.draw",
    "requant.tasks.plan",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3_5.modeling_qwen3_5",
)
READ_LATE = {
    "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_SECRET_ACCESS_KEY", "CEPH_FOLDER",
    "ENGINE_ACCEPTS", "ENGINE_DAMAGE", "ENGINE_PIDS", "HF_TOKEN", "PYTEST_CURRENT_TEST", "REQUANT_STORE",
    "REQUANT_VLLM", "XDG_CACHE_HOME",
}  # fmt: skip
QUANTIZE = Server(
    "auto_round",
    "requant.tasks.quantizing.child",
    "requant.tasks.quantizing.loop.gated_delta_rule",
    "requant.tasks.quantizing.loop.profile",
    "requant.tasks.quantizing.loop.tune",
    "transformers",
)
READ_AT_IMPORT = {  # as requant.tasks.quantizing.memory_fallback sets them
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "AR_LOG_LEVEL": "INFO",
}  # fmt: skip


def forked(arguments: Sequence[str], environment: Mapping[str, str]) -> Fork:
    """Start `python ARGUMENTS` (-m MODULE or -c CODE) in a fork of the server of commands."""
    assert COMMANDS.address, "the fixture `environment` starts the server"
    different = COMMANDS.differing(environment) - READ_LATE
    assert not different, f"{', '.join(sorted(different))} may be read at import: a fork is too late, use a new process"
    return Fork(COMMANDS.address, arguments, env=environment)


def quantize_server() -> str:
    """Start the server of quantize children, and return its address."""
    QUANTIZE.start({**os.environ, **READ_AT_IMPORT})
    return QUANTIZE.address


@contextmanager
def forked_children(address: str) -> Iterator[None]:
    """Let the quantize stage of this process have forks for children.

    A test that looks for a child among the processes, or kills it, does without.
    """
    from requant.tasks.quantizing import memory_fallback as stage

    def start(command: list[str], *, env: Mapping[str, str], **how: Any) -> Fork:
        assert command[0] == sys.executable and env.items() >= READ_AT_IMPORT.items()
        return Fork(address, command[1:], env=env, **how)

    with mock.patch.object(stage, "subprocess", SimpleNamespace(Popen=start, PIPE=PIPE)):
        yield


if __name__ == "__main__":
    with forked_children(sys.argv[1]):
        run(["-m", *sys.argv[2:]])
