"""Structure checks, parity, metrics and reports."""
