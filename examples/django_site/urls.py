"""Where each view is."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

from examples.django_site.bank import views

urlpatterns = [
    path("", views.index, name="index"),
    path("accounts/new", views.open_account, name="open"),
    path("accounts/<uuid:account_id>", views.account, name="account"),
    path("accounts/<uuid:account_id>/statement", views.statement, name="statement"),
    path("accounts/<uuid:account_id>/<slug:action>", views.act, name="act"),
    path("transfers", views.transfers, name="transfers"),
    path("admin/", admin.site.urls),
]
