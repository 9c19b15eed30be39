"""Nothing that Megatron looks for here is emulated; it goes on without."""
