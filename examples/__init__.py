"""Programs that show the package at work, beside ``example_app``."""
