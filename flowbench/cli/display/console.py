"""The one terminal that everything is printed to."""

from __future__ import annotations

from rich.console import Console

console = Console()
