"""Entry point for tools that still look for it; everything is declared in setup.cfg."""

from setuptools import setup

setup()
