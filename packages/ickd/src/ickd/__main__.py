"""`python -m ickd`: the command line, for torchrun."""

import sys

from ickd.cli import main

sys.exit(main())
