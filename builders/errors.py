"""What may go wrong for a user who builds or trains, each kind with the exit code that a command gives it.

Programming mistakes stay assertions. These are for what a person can put right: the message names the place, what was
expected there and what to do.
"""


class TrainingError(Exception):
    """Base of the three kinds."""

    exit_code = 1


class Refused(TrainingError):
    """The answer is no: the spec asks for what this version does not train, or contradicts the run it resumes."""


class Misuse(TrainingError):
    """An input is missing, unreadable or in the way."""

    exit_code = 2


class EnvironmentFailed(TrainingError):
    """The disk, the device or an installed package failed."""

    exit_code = 3


class Stopped(Exception):
    """A signal asked for the end; whoever holds state saves it and passes this on."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number
