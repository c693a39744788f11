"""The work of a command in a process of its own: a library that crashes on a damaged file still gives one line."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from cpd_onnx.io.streams import print_error

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def supervised(work: Callable[[], int]) -> int:
    """Do `work` in a child process: its exit code, or 1 and a line on stderr if it crashed or was killed.

    onnx and onnxruntime are compiled: a division by zero or a read outside memory in them ends the process that called
    them, and no handler of Python's can say so. Call this before libraries with threads are loaded. Signals that are
    sent to this process go on to the child, which does not outlive it. Not on Linux, `work` is done right here.
    """
    if sys.platform != "linux":
        return work()
    waited = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before, parent = signal.pthread_sigmask(signal.SIG_BLOCK, waited), os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return work()
    ended, status = 0, 0
    while not ended:
        told = signal.sigwaitinfo(waited)
        if told.si_signo != signal.SIGCHLD and told.si_code <= 0:  # the terminal's own reach the child without us
            os.kill(child, told.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = signal.Signals(os.WTERMSIG(status))
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        return 128 + number
    if number == signal.SIGALRM:  # nobody waited any longer, and says so
        return 1
    print_error(f"error: {_complaint(number)}; no file is left half-written")
    return 1


def _complaint(number: signal.Signals) -> str:
    if number == signal.SIGKILL:
        return "the work was killed from outside, as the system does when memory runs out: give it more memory"
    return (
        f"onnxruntime, onnx or torch crashed in the midst of the work ({number.name}), as they do on some damaged "
        "files: see whether onnxruntime runs this one, and report it if it does"
    )
