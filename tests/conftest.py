"""What holds for all tests."""

import os

os.environ.pop("COLUMNS", None)  # processes of pytest-xdist get a width of 80, in which tables wrap
