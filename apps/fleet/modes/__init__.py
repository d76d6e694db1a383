"""A host's mode and how it changes: plan.py decides, saga.py acts, ssh.py speaks to the host, keeper.py keeps it going."""
