"""Callers that begin their calls when they are due, not when the last one has ended."""
