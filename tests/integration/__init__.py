"""Flask apps on each database, from the request to the rows.

A test asks for ``site``, a Flask app with the bank (``tests/bank.py``, ``tests/domain.py``), and is run on each
database that ``marks.py`` lets it have. ``new_site(Bank, **config)`` makes one with other settings.
``site.answer(view)`` sends a request to a function, and ``site.stored()`` counts the events and notes that another
transaction sees.
"""
