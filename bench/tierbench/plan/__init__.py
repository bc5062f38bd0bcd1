"""`tierbench plan`: which budgets meet a target on a machine, and which of them costs least."""
