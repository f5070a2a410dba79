"""The events of an application in Cassandra."""
