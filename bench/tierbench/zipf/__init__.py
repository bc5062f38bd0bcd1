"""Workloads by Zipf's law: made from parameters, and parameters fitted to a trace that stays where it is."""
