"""The InfoSAM loss."""
