"""What fusion of all layers claims."""
