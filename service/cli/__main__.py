"""`python -m service.cli` is `prefix-service`."""

from service.cli import main

main()
