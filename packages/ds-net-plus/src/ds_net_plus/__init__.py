"""Dynamic weight slicing."""
