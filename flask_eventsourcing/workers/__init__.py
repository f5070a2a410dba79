"""Adapters for servers and task queues; each imports its optional dependency only itself."""
