"""Everything that imports Megatron-Core: the names that are bound, and what takes their place."""
