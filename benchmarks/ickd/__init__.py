"""What ICKD claims, and how fast its losses are."""
