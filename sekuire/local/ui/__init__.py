"""The dashboard of the local platform. A map of its code:

- ``app.py``: the Flask application: sessions, tokens, headers, errors, static files, the stream of signals.
- ``pages/``: one module for each page, with ``add(app, desk)``. It is listed in ``pages/__init__.py``. A page is
  ``render("NAME", title, {"REGION": Region(topics, build)})``, the templates ``NAME.html`` (extends ``base.html``, has
  ``{{ region("REGION") }}``) and ``NAME_REGION.html``, and a link in ``base.html``. An action is a POST that ends with
  ``done(message, to)``; its form has ``{{ token() }}`` or comes from the macro ``act`` of ``parts.html``.
- ``rendering.py``: ``render``, ``Region``, ``done``, and the filters of the templates (``when``, ``duration``, ...).
- ``desk.py``: the platform's parts and actions that pages work with. ``desk.signals.nudge("tasks")`` notifies the open
  pages after a change that no request of the contract makes.
- ``queries.py``: what is read by SQL, by indexes and in short pieces. ``figures.py``: the figures and charts.
- ``signals.py``: which topics have changed, for the open pages. A region with such a topic fetches itself again.
- ``sessions.py``: one-time codes, sessions, form tokens.
- ``static/``: ``ui.css``, ``ui.js``, and ``vendor/`` with ``manifest.json`` (name, version, licence, SHA-256).
"""

from __future__ import annotations

from .app import Dashboard as Dashboard

__all__ = ["Dashboard"]
