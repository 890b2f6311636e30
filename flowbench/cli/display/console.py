"""The one terminal that everything is printed to."""

from __future__ import annotations

from rich.console import Console

from flowbench.launch import is_main

console = Console(quiet=not is_main())  # of several processes one prints
