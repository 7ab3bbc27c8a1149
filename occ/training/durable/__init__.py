"""What survives a kill, a full disk, a damaged file, updates that are not finite."""
