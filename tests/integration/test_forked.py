"""A fork of the tests' servers does what a new process would: status, output, signals, exceptions, input, the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from infra.dev.hub.launch import HubStandIn
from tests.factories.forked import COMMANDS, forked
from tests.factories.forks import Fork, Server
from tests.factories.paths import ROOT
from tests.factories.requant import Requant, finish, wait_for

ENDS = {
    "done": "print('written', end='')",
    "status": "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
    "sentence": "raise SystemExit('a sentence')",
    "exit function": "import atexit; atexit.register(print, 'last'); print('first')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "killed": "import os, signal; print('lost in the buffer'); os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; print('flushed', flush=True); os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import signal; signal.signal(2, signal.default_int_handler)\n"
    "try: signal.raise_signal(2)\nexcept KeyboardInterrupt: print('interrupted')",
    "input": "print(repr(input()))",
    "child": "import subprocess, sys; subprocess.run(['sh', '-c', 'echo of a child; exit 4'])",
    "arguments": "import os, sys; print(sys.argv, os.getcwd(), sorted(os.environ), __name__)",
    "error": "print('before'); raise ValueError('why')",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_new_process_does(end: str, environment: dict[str, str]) -> None:
    arguments = ["-c", ENDS[end], "one", "two"]
    run = [sys.executable, *arguments]
    new = subprocess.run(run, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    fork = finish(forked(arguments, environment))
    assert (fork.status, fork.stdout) == (new.returncode, new.stdout)
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]
    assert fork.stderr.startswith("Traceback") == new.stderr.startswith("Traceback")


def test_a_fork_dies_by_an_interrupt_that_it_does_not_catch() -> None:
    """Use a server without modules: torch._dynamo's exit makes an interpreter forget that it was interrupted."""
    server = Server()
    server.start(os.environ)
    fork = Fork(server.address, ["-c", "raise KeyboardInterrupt"], env=os.environ)
    assert fork.communicate()[1].endswith("\nKeyboardInterrupt\n") and fork.returncode == -signal.SIGINT


def test_a_forked_run_that_is_terminated_ends_as_by_ctrl_c(requant: Requant, hub: HubStandIn) -> None:
    hub.reset_traffic()
    hub.fault(r"/api/models/demo/pico/revision/", times=1, delay=20)
    fork = requant.fork_run(publish=None)
    wait_for(lambda: any("/revision/" in t["path"] for t in hub.traffic()))
    fork.send_signal(signal.SIGTERM)
    outcome = finish(fork)
    assert outcome.status == 130 and outcome.document["error"].startswith("interrupted: what was finished is kept")
    assert "Traceback" not in outcome.stderr


def test_a_fork_is_of_the_group_of_the_tests_or_leads_a_session(environment: dict[str, str]) -> None:
    where = "import os; print(os.getpid(), os.getpgid(0), os.getsid(0))"
    fork = forked(["-c", where], environment)
    assert fork.communicate()[0].split() == [str(n) for n in (fork.pid, os.getpgid(0), os.getsid(0))]
    leader = Fork(COMMANDS.address, ["-c", where], env=environment, start_new_session=True)
    assert leader.communicate()[0].split() == [str(leader.pid)] * 3


def test_a_fork_reads_its_input_until_it_is_closed_and_is_waited_for_as_long_as_asked(
    environment: dict[str, str],
) -> None:
    code = "import sys; print('ready', flush=True); print(sys.stdin.read())"
    fork = Fork(COMMANDS.address, ["-c", code], env=environment, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        fork.wait(0.01)
    with pytest.raises(subprocess.TimeoutExpired) as late:
        fork.communicate(0.01)
    assert fork.poll() is None and late.value.stderr == ""
    fork.stdin.write(b"words")
    fork.stdin.close()
    assert fork.communicate() == ("ready\nwords\n", "") and fork.returncode == 0


def test_a_variable_that_is_read_at_import_is_refused_by_its_name(requant: Requant) -> None:
    with pytest.raises(AssertionError, match="HF_ENDPOINT, HF_HUB_OFFLINE may be read at import"):
        requant.variant(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://hub.example", HF_TOKEN="hf_x")("store", "ls")


TESTS = """
import os, psutil
from tests.factories.forks import Fork, Server
server = Server()
server.start(os.environ)
fork = Fork(server.address, ["-c", "import signal; signal.pause()"], env=os.environ)
print(fork.pid, psutil.Process(fork.pid).ppid(), flush=True)
input()
"""


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_server_and_forks_end_with_the_process_of_the_tests(end: str) -> None:
    command, pipe = [sys.executable, "-c", TESTS], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as tests:
        assert tests.stdout
        both = [psutil.Process(int(pid)) for pid in tests.stdout.readline().split()]
        if end == "killed":
            tests.kill()
    if end == "closed":
        assert not any(map(lives, both))
    wait_for(lambda: not any(map(lives, both)))


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two
        return False
