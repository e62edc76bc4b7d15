"""`python -m upcycling.bench`, as notebook 09 prints it: the verb `bench`."""

from ..cli import run

if __name__ == "__main__":
    run("bench")
