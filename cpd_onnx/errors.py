"""What can go wrong in a way that a user can act on.

Every class here carries one line: what is wrong, with the name and the value, and what to do next.
Misuse of a function raises `ValueError` or `TypeError`; a broken invariant of ours is an `AssertionError`.
"""


class CpdError(Exception):
    """Base of all errors that a user can act on."""


class ModelError(CpdError):
    """The ONNX file cannot be read, is inconsistent, or cannot be written."""


class PlanError(CpdError):
    """A plan is malformed or does not belong to the model."""


class TargetError(CpdError):
    """The asked-for target or option makes no sense for this model."""


class DataError(CpdError):
    """Calibration or training data does not fit the model."""


class UnsupportedError(CpdError):
    """The model needs something that this step does not support."""


class EndlessError(UnsupportedError):
    """A run of the model took longer than anybody waits."""


class ProofError(CpdError):
    """The pruned model does not do what the plan says."""


class InconclusiveError(CpdError):
    """Neither that the pruned model does what the plan says nor that it does not can be shown on these inputs."""


class StoppedError(CpdError):
    """The process was told to stop; what was done so far is kept and can be continued."""
