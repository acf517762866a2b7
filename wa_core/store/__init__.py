"""Object stores: the port and its memory, local and S3 adapters."""
