"""`python -m afa`, and so `torchrun -m afa`."""

import sys

from afa.commands.cli import main

sys.exit(main())
