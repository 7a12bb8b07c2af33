"""`python -m filip_vl`: the command line, for torchrun."""

import sys

from filip_vl.cli import main

sys.exit(main())
