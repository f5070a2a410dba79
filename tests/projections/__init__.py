"""Projections, on each database."""
