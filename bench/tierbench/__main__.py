"""`python -m tierbench`."""

import sys

from tierbench.cli import main

sys.exit(main())
