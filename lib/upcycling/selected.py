"""`python -m upcycling.selected`, as notebook 08 prints it: the verb `select`."""

if __name__ == "__main__":
    from .cli import run

    run("select")
