"""What ``python -m fastlstm.train`` and ``python -m fastlstm.sample`` are made of."""


class UserError(Exception):
    """A mistake of the user's: one line on standard error and exit status 2."""
