"""A package of one line, for the tests of the command line."""
