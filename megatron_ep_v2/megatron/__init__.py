"""All code that imports Megatron-Core: the symbols that `install()` binds, and their replacements."""
