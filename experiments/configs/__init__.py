"""Named configurations, each a function without arguments."""
