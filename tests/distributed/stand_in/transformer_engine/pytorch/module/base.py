"""Empty: Megatron treats the names that it imports from here as optional."""
