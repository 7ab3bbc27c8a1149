"""State, train step, rollout, loop."""
