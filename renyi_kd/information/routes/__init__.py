"""The ways to tr A^alpha."""
