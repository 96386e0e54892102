"""`rlhf doctor`: does this machine run what the config asks for? Importing this package imports no torch.

Each check is a function that returns a `Finding`; whatever may hang or crash happens in a child process or a thread
with a time limit, so that the doctor itself always comes to its end.
"""

from rlhf.doctor.finding import Finding, Level
from rlhf.doctor.visit import Visit, run_doctor

__all__ = ["Finding", "Level", "Visit", "run_doctor"]
