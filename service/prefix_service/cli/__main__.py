"""`python -m prefix_service.cli` is `prefix-service`."""

from prefix_service.cli import main

main()
