"""Facts, arithmetic and one commit protocol; knows no service and no framework."""
