"""The library's own tests of recorders and systems, on each database and each host, without a change."""
