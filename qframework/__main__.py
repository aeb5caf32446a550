"""The command: python -m qframework."""

from importlib.util import find_spec


def main() -> None:
    """Run it, or say what it needs."""
    if find_spec("typer") is None:
        raise SystemExit(
            "python -m qframework needs typer, which isn't installed: pip install 'qframework[cli]'"
        )
    from qframework.command.app import app

    app()


if __name__ == "__main__":
    main()
