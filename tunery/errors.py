"""Errors of the command itself; those of the service are `tunery.client.ClientError`."""

from __future__ import annotations


class SetUpError(Exception):
    """The machine or the arguments don't allow what was asked; the message says what to do."""
