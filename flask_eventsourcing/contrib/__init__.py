"""Adapters for other projects; each module imports its optional dependency itself."""
