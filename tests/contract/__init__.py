"""What the network's provider software asks of a port checker, replayed."""
