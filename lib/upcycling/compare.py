"""The comparison of notebook 04 under its old name: `python -m upcycling.compare`."""

if __name__ == "__main__":
    import sys

    from .experiments.compare import main

    sys.exit(main())
