"""Sphinx configuration; ``make docs`` builds."""

import django
from django.conf import settings

# Django's models can be imported only where there are settings.
settings.configure(INSTALLED_APPS=["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes"])
django.setup()

project = "Flask-EventSourcing"
project_copyright = "Flask-EventSourcing contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
