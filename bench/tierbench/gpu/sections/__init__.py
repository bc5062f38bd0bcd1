"""One module for each section; `tierbench/gpu/__init__.py` says what it holds."""
