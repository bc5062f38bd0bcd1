"""Whether asking ahead hides what rows cost: a small transformer with its rows from three places."""
