"""Our losses and token selections inside other trainers. Each module needs torch, `megatron_ext.rl` and its trainer."""
