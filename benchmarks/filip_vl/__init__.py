"""What FILIP claims, and how fast its loss is."""
