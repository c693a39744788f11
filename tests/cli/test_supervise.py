"""A library that crashes, a kill from outside: one line, and nothing that goes on alone."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the work is done in the same process there")

CALL = "import os, signal, sys, time\nfrom cpd_onnx.cli.supervise import supervised\n"
WAIT = "for _ in range(1200): time.sleep(0.05)"
"""One long sleep would be entered, and not interrupted, if the signal came just before it."""


def script(body: str) -> list[str]:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return [sys.executable, "-c", f"{CALL}def work():\n{lines}    return 0\nsys.exit(supervised(work))"]


def ran(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(script(body), capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def started(body: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process whose work has done all but its last line, and the number of its child."""
    *lines, last = body.splitlines()
    ready = "\n".join([*lines, "print(os.getpid(), flush=True)", last])
    with subprocess.Popen(script(ready), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())


def is_gone(child: int) -> bool:
    """Whether a process has ended, soon."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_what_the_work_returns_and_prints_goes_out() -> None:
    done = ran("print('one'); print('two', file=sys.stderr); return 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "one\n", "two\n")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_one_line(number: signal.Signals) -> None:
    done = ran(f"os.kill(os.getpid(), {int(number)}); time.sleep(60)")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: ")
    assert f"({number.name})" in done.stderr


def test_a_kill_by_the_system_is_said() -> None:
    done = ran("os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "memory" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_work(number: signal.Signals) -> None:
    with started(f"signal.signal({int(number)}, lambda *_: sys.exit(5))\n{WAIT}") as (process, child):
        process.send_signal(number)
        assert process.wait(20) == 5
        assert is_gone(child)


def test_work_that_a_signal_ends_says_nothing() -> None:
    with started(WAIT) as (process, _):
        process.terminate()
        assert (process.communicate()[1], process.returncode) == ("", 128 + signal.SIGTERM)


def test_the_work_ends_with_a_parent_that_is_killed() -> None:
    with started(WAIT) as (process, child):
        process.kill()
        assert is_gone(child)


def test_nothing_is_loaded_before_the_child_is_there() -> None:
    """A fork in a process with threads may hang."""
    code = "import os, cpd_onnx.__main__, sys; print(len(os.listdir('/proc/self/task')), 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


def test_an_interrupt_at_the_terminal_reaches_the_work_once() -> None:
    """The terminal sends it to both processes."""
    body = "told = []\nsignal.signal(signal.SIGINT, lambda *_: told.append(1))\nprint('ready', flush=True)\n"
    line = script(f"{body}time.sleep(1)\nreturn 10 + len(told)")
    child, terminal = pty.fork()
    if child == 0:
        os.execv(line[0], line)
    assert b"ready" in os.read(terminal, 100)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    os.close(terminal)
