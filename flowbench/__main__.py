"""`python -m flowbench`."""

from flowbench.cli.main import main

main()
