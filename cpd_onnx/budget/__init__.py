"""Who goes: widths under a budget in channels, MACs, parameters, bytes or latency."""
