"""`tierbench`: makes checkpoints and measures tierstore beside its yardsticks."""
