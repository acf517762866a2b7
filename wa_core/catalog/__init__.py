"""What the processes exchange through the bucket, committed create-once."""
