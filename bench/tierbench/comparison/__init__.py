"""Two records side by side: `figures` finds what is measured in each, `verdict` says what has changed."""
