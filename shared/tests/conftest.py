"""Settings of the core's tests."""

import torch
from jaxtyping import install_import_hook

# Two processes share the cores, and tiny operations are slow on many threads.
torch.set_num_threads(1)

# Checks every shape annotation while the tests run; an int may stand for a float (PEP 484).
install_import_hook(
    "tenfold", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
