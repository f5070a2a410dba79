"""The documentation: its examples run, and its names and links lead somewhere."""
