"""The tests of the example bank."""
