"""What a run will cost, computed before it: images, function evaluations, memory of each phase, time."""
