"""`python -m bert_oversmoothing`: the command line, for torchrun."""

import sys

from bert_oversmoothing.cli import main

sys.exit(main())
