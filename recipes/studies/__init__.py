"""Studies: compare every entropy-control method on small tasks, with several seeds and confidence intervals."""
