"""The processes; they meet only through typed records in the bucket."""
