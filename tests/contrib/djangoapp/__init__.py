"""An installed app for the tests of the bridge to Django."""
