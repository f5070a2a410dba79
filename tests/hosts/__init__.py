"""What holds on every host: Flask, SQLAlchemy alone, zope.sqlalchemy and Django.

A test asks for ``site``, a ``HostSite`` with the bank, and is run on each host and database. ``with site.working():``
is a piece of work with one session, ``site.bank`` the application in it, and ``site.commit()`` ends its transaction.
``site.stored()`` counts the events and notes that another transaction sees.
"""
