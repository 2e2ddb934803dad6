"""What runs the tasks of a sweep: this process, processes of this machine, a Ray cluster."""
