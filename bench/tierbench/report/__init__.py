"""The report: one HTML file, and PNGs, from records."""
