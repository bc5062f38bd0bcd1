"""Tables that learn: rows with their optimizer's state in DRAM over an update log."""
