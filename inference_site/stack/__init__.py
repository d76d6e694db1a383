"""What `manage.py up` is made of: the embedded stores, the supervised processes and the welcome."""
