"""What can be wrong with a run.

RunFault (ValueError)
|-- Unrecordable    the training has something that cannot be repeated from a record
|-- RunMissing      no run in the folder, or no such state or row in the run
|-- RunCorrupt      cut short, damaged, edited or of another schema
`-- RunMismatch     the model is not the one that was trained
"""

from service.errors import RunFault as RunFault  # raised by itself, too


class Unrecordable(RunFault):
    """The training has something that cannot be repeated from a record."""


class RunMissing(RunFault):
    """There is no run in the folder, or no such state or row in the run."""


class RunCorrupt(RunFault):
    """The run was cut short, is damaged, was edited or has another schema."""


class RunMismatch(RunFault):
    """The model is not the one that was trained."""
