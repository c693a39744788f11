"""Allocation: the widths of groups under a budget in channels, MACs, parameters, bytes or latency."""
