"""Real web servers and task queues: uWSGI, gunicorn, Celery and RQ, started as a user starts them.

``workspace`` is the folder, the database and the Redis of one test. The modules that do not begin with ``test_`` are
the apps that the servers import; the first line of each says which.
"""
