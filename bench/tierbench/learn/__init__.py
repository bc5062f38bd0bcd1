"""Whether a model learns more with an Engram table in tierstore than without: small, real, on the CPU."""
