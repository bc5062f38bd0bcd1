"""The product's main job from end to end, on real text, with every returned row checked."""
