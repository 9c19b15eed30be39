"""The evidence bench: small tasks on which every entropy-control method is compared, with seeds and intervals."""
