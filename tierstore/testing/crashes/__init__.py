"""Crashes at random moments: what a training store must be after each, and programs that look."""
