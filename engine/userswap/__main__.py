"""`python -m userswap`: the same as the `userswap` command."""

import sys

from userswap.engine.cli import main

sys.exit(main())
