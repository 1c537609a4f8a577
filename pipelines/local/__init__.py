"""A run on this machine: its servers, its steps, what its user sees."""
