"""Events in Apache Cassandra: first in a simulation with every possible failure, then on real nodes.

``connection`` is one to the run's node, ``new_log`` makes the log of another application, and a ``cluster`` has three
nodes. In ``hosts/`` it is a Flask app, a Django project or no framework that has its events there.
"""
