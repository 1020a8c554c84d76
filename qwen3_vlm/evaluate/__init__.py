"""What a checkpoint is worth: losses, gates, golden samples, caption scores and the report of a run."""
