"""`python -m saekit` is the `saekit` command."""

import sys

from saekit.cli import main

sys.exit(main())
