"""A run under faults; see `__main__`."""
