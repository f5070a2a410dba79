"""The bank as a Django app."""
