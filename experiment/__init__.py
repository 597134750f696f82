"""What ann.py and snn.py share: data, checkpoints, epoch loops, options, logs, sweeps."""


class UserError(Exception):
    """Something the user can put right. Its text is one line that says what is wrong and what to do."""
