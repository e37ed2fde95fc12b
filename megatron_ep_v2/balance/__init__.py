"""Overload of ranks, and redundant experts that would remove it: the plan alone, no weights and no dispatch yet."""
