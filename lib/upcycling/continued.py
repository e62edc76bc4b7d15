"""`python -m upcycling.continued`, as notebook 08 names it: the verb `continue`."""

if __name__ == "__main__":
    from .cli import run

    run("continue")
