"""One module at a time, without a database, and the shape of the package."""
