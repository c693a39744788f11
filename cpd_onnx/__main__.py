"""`python -m cpd_onnx`."""

import sys

from cpd_onnx.cli import main

sys.exit(main())
