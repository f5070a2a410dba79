"""The Django site of ``two_sites``, for gunicorn, and its Celery app; the database is that of ``DATABASE_URL``."""
