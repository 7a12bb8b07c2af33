"""Over-smoothing in Transformer encoders: measures, the theorem, hierarchical fusion."""
