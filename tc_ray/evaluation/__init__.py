"""Pilot against fused model on held-out data."""
