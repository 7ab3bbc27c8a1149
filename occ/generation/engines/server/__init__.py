"""What runs in the engine's process; `wire` is shared with the client."""
