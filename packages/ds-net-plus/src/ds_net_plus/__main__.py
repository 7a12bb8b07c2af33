"""`python -m ds_net_plus`: the command line, for torchrun."""

import sys

from ds_net_plus.cli import main

sys.exit(main())
