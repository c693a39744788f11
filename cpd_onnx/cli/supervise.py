"""Runs a command in a child process, so that a crash of a native library still ends with a one-line error."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from cpd_onnx.errors import REPORT_BUG
from cpd_onnx.io.streams import print_error

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2), from <linux/prctl.h>."""


def supervised(work: Callable[[], int]) -> int:
    """Run `work` in a child process; return its exit code, or 1 after a one-line error if it crashed or was killed.

    onnx and onnxruntime are native libraries: a division by zero or an invalid memory access in them ends the calling
    process, and no Python exception handler can report it. Call this before libraries that start threads are loaded.
    Signals sent to this process are forwarded to the child, which does not outlive it. On systems other than Linux,
    `work` runs in this process.
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
        received = signal.sigwaitinfo(waited)
        if received.si_signo != signal.SIGCHLD and received.si_code <= 0:  # those of the terminal reach the child too
            os.kill(child, received.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = signal.Signals(os.WTERMSIG(status))
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        return 128 + number
    if number == signal.SIGALRM:  # loading timed out; the caller prints the error
        return 1
    print_error(f"error: {_cause(number)}; no partly written file is left behind")
    return 1


def _cause(number: signal.Signals) -> str:
    """Return why the child ended, and what to do about it."""
    if number == signal.SIGKILL:
        return "the process was killed, most likely by the system because memory ran out; provide more memory"
    return (
        f"onnxruntime, onnx or torch crashed ({number.name}), as they do on some damaged files; if onnxruntime runs "
        f"this model, {REPORT_BUG}"
    )
