"""The tests of the bank in Cassandra."""
