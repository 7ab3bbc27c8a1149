"""What a run starts from: weights of others, demonstrations, the model's own samples."""
