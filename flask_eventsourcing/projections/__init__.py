"""Projections: read models in the application's own database, kept up to date with its events."""

from __future__ import annotations

from .definitions import ModelProjection, on, reaction

__all__ = ["ModelProjection", "on", "reaction"]
