"""Route the only page."""

from django.urls import path
from orders import views

urlpatterns = [path("", views.orders)]
