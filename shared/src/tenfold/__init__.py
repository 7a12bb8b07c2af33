"""The shared core of the Tenfold packages."""
