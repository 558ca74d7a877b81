"""Operators with a gradient of their own."""
