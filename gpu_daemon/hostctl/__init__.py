"""The host's side of a mode switch: starts and stops this machine's daemons when the site asks over SSH."""
