"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(Exception):
    """Something the user can mend: what came, what was wanted, and where. The message is one line."""
