"""Dense to Mixture-of-Experts upcycling."""
