"""Images with labels, from disk or generated."""
