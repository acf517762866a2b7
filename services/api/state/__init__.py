"""What the API knows of the bucket: read as seldom as can be, and kept in memory."""
