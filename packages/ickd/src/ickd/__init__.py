"""Inter-channel correlation distillation (ICKD), and the other distillation losses beside it.

The public names are imported when they are first used, so that the command line can print its help
without loading torch.
"""
