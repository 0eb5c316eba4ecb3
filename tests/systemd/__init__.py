"""The package, its units, and the manual, in Debians that systemd has booted."""
