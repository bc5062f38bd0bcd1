"""What asking ahead costs and gains, apart from any model."""
