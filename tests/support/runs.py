"""Command lines that are quick and repeatable: nothing is timed, held out, bounded or rounded unless they say so."""

from __future__ import annotations

from collections.abc import Iterable

_COMMANDS = {"prune": "channels=0.5", "compress": "macs=0.5", "sweep": None}
"""Commands that choose channels, and the target that they get."""


def plain(arguments: Iterable[object]) -> list[str]:
    """Return a command line with the options that switch measurements and bounds off, unless they are in it.

    The tests of the measurements themselves call the commands without it.
    """
    words = [str(argument) for argument in arguments]
    if not words or words[0] not in _COMMANDS or "--help" in words:
        return words
    given = {word for word in words if word.startswith("-")}
    is_repeated = bool(given & {"--recipe", "--like"})
    more = [] if given & {"--check-speed", "--no-check-speed"} else ["--no-check-speed"]
    if not given & {"--round-to", "--multiple", "--profile"} and not is_repeated:
        more += ["--round-to", "1"]
    if not given & {"--target", "--max-loss"} and not is_repeated and _COMMANDS[words[0]]:
        more += ["--target", str(_COMMANDS[words[0]])]
    if "--data" not in given and not given & {"--blind", "--recipe"}:
        more += ["--blind"]
        more += [] if "--score" in given else ["--score", "l2"]
        more += [] if given & {"--repair", "--no-repair"} else ["--no-repair"]
    if "--data" in given:
        more += [] if "--hold-out" in given else ["--hold-out", "0"]
        more += [] if "--effort" in given or is_repeated else ["--effort", "0"]
        more += [] if given & {"--max-loss", "--most-lost"} or words[0] == "sweep" else ["--max-loss", "inf"]
    return words + more
