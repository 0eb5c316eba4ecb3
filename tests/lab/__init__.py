"""A lab of network namespaces: verdicts against what is known to be true."""
