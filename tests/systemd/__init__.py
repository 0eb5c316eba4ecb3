"""The unit, installed as docs/operating.md says, in a Debian that systemd has booted."""
