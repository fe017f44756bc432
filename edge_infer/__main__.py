"""The device's command line: ``python -m edge_infer info|run|verify|bench|selftest BUNDLE``."""

import sys

from edge_infer.runtime.cli import main

sys.exit(main())
