"""Which record stays: replays of record traces through replacement policies, old and ours."""
