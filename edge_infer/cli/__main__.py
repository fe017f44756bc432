"""``python -m edge_infer.cli``: the host's command line without its script on the PATH."""

import sys

from edge_infer.cli import main

sys.exit(main())
