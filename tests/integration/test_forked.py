"""A fork of the tests' fork server does what a new process would: status, output, signals, exceptions, the end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from infra.hub.launch import HubStandIn
from tests.factories.forked import Forked
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
    "child": "import subprocess, sys; subprocess.run(['sh', '-c', 'echo of a child; exit 4'])",
    "arguments": "import os, sys; print(sys.argv, os.getcwd(), sorted(os.environ), __name__)",
    "error": "print('before'); raise ValueError('why')",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_new_process_does(end: str, environment: dict[str, str]) -> None:
    arguments = ["-c", ENDS[end], "one", "two"]
    new = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    fork = finish(Forked(arguments, environment))
    assert (fork.status, fork.stdout) == (new.returncode, new.stdout)
    assert fork.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]
    assert fork.stderr.startswith("Traceback") == new.stderr.startswith("Traceback")


def test_a_forked_run_that_is_terminated_ends_as_by_ctrl_c(requant: Requant, hub: HubStandIn) -> None:
    hub.reset_traffic()
    hub.fault(r"/api/models/demo/pico/revision/", times=1, delay=20)
    fork = requant.fork_run(publish=None)
    wait_for(lambda: any("/revision/" in t["path"] for t in hub.traffic()))
    fork.send_signal(signal.SIGTERM)
    outcome = finish(fork)
    assert outcome.status == 130 and outcome.document["error"].startswith("interrupted: what was finished is kept")
    assert "Traceback" not in outcome.stderr
