"""Slice and mend: from the channels that go to the pruned model and its plan."""
