"""Event sourcing in a Django project, with Django's own connections, transactions and models.

``site`` is the bank in the project of ``project.py``, on a new database of each kind. ``former/`` has what other
packages have stored, and ``cases.py`` the tests that a user's project runs by ``manage.py test``.
"""
