"""`prefix-service`: the one entry point; each command imports its side only when it runs."""


def main() -> None:
    """Run the command line."""
    from prefix_service.cli.app import run

    run()
