"""The bank of ``example_app`` in a Django project: the same domain module, other models, views and transactions."""
