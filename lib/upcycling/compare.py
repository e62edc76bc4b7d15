"""`python -m upcycling.compare`, as notebook 04 prints it: the verb `compare`."""

if __name__ == "__main__":
    from .cli import run

    run("compare")
