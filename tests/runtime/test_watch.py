"""Runs that take too long are ended, and the time in which the process is stopped does not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cpd_onnx.runtime import watch

STOPPED = 3.0
"""Seconds for which a process is stopped."""
CHILD = """
import time
from cpd_onnx.runtime import watch
watch._INTERVAL, watch._LONGEST = 0.05, 0.1
with watch.ended_after(2.0) as limits:
    print("runs", flush=True)
    for _ in range(8):
        time.sleep(0.05)
    print(limits.terminate)
"""


def test_a_run_is_ended_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    with watch.ended_after(3600) as long, watch.ended_after(0.05) as short:
        while not short.terminate:
            time.sleep(0.01)
        assert not long.terminate


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped")
def test_time_in_which_the_process_is_stopped_does_not_count() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "runs\n"
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(STOPPED)
        os.kill(child.pid, signal.SIGCONT)
        assert child.stdout.read() == "False\n"
