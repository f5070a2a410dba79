"""The events of an application in Apache Cassandra, usable as the library's ``PERSISTENCE_MODULE``."""
