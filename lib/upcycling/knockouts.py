"""`python -m upcycling.knockouts`, as notebook 05 prints it: the verb `knockouts`."""

if __name__ == "__main__":
    from .cli import run

    run("knockouts")
