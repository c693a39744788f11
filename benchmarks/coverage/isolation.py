"""Benchmark jobs in separate processes, so that a crash or a hang affects one model only."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]


def limited(job: Callable[[], Result], seconds: float) -> Result:
    """Return the result of a job, run in a process that is killed after some seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(job()))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"status": "failed", "reason": "out of time"}
    except EOFError:
        return {"status": "failed", "reason": f"process died with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
