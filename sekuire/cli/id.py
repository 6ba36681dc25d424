"""Calculate the SekuireID of an agent: ``sekuire id``."""

from __future__ import annotations

import argparse

from . import terminal
from .exits import FAILED, OK, CommandError

DESCRIPTION = """\
Calculate the SekuireID of the agent that a manifest describes, from its model, its system prompt and its tools."""
EPILOG = """\
Exit codes: 0 the id is on stdout; 1 it differs from project.sekuire_id, which must be registered again; 2 the manifest
cannot be used."""
LOG_LEVEL = "warning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manifest", default="sekuire.yml", metavar="PATH", help="the manifest's file (default: sekuire.yml)"
    )


def run(args: argparse.Namespace) -> int:
    from ..manifest import read_manifest

    manifest = read_manifest(args.manifest)
    for warning in manifest.warnings:
        terminal.note(f"warning: {warning}")
    if manifest.identity is None:
        raise CommandError(f"{args.manifest} has no identity: give it identity.model and identity.system_prompt_path")
    found = manifest.identity.sekuire_id()
    terminal.say(found)
    if manifest.sekuire_id not in (None, found):
        terminal.note(f"{args.manifest} says {manifest.sekuire_id}: the model, the prompt or a tool has changed since")
        return FAILED
    return OK
