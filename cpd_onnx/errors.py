"""Errors that a user can act on.

The message of each is one line: what is wrong, with the name and the value, and what to do next.
Misuse of a function raises `ValueError` or `TypeError`; a broken invariant of this package is an `AssertionError`.
"""

ISSUES = "https://github.com/cpd-onnx/cpd-onnx/issues"
"""URL of the issue tracker, the same as in pyproject.toml; the only place in the code that names it."""
REPORT_BUG = f"please report it at {ISSUES}"
"""End of every message about an internal error."""


class CpdError(Exception):
    """Base class of all errors that a user can act on."""


class ModelError(CpdError):
    """The ONNX file cannot be read, is inconsistent, or cannot be written."""


class PlanError(CpdError):
    """The plan is malformed or does not belong to the model."""


class TargetError(CpdError):
    """The requested target or option is out of range or cannot be met for this model."""


class DataError(CpdError):
    """The calibration or training data does not fit the model."""


class UnsupportedError(CpdError):
    """The model needs something that this step does not support.

    Attributes:
        problem: The message without the advice that follows it, for callers who have another.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        """Create the error from what is wrong and what to do next."""
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem


class EndlessError(UnsupportedError):
    """A run of the model exceeded its time limit."""


class ProofError(CpdError):
    """The pruned model does not compute what the plan says."""


class InconclusiveError(CpdError):
    """The inputs that were tried neither prove nor disprove that the pruned model computes what the plan says."""


class NotFasterError(CpdError):
    """The pruned model is not faster than the original."""


class LossError(CpdError):
    """Every model that is smaller than the original loses more than is allowed."""


class StoppedError(CpdError):
    """The process was interrupted; a checkpoint holds the work done so far and can be continued."""


class OutputError(CpdError):
    """Standard output cannot be written to.

    Attributes:
        is_pipe: Whether standard output is a pipe whose reader has closed it.
    """

    def __init__(self, message: str, *, is_pipe: bool = False) -> None:
        """Create the error from its message and whether the cause is a closed pipe."""
        super().__init__(message)
        self.is_pipe = is_pipe
