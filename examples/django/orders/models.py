"""Define an order and its confirmation."""

from django.db import models


class Order(models.Model):
    item = models.CharField(max_length=100)
    confirmation = models.TextField(blank=True)
