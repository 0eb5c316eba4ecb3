"""The unit and README's installation, in a Debian that systemd has booted."""
