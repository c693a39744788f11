"""Quality: what a run is to keep of the original, the search for the smallest model that does, and what came of it."""
