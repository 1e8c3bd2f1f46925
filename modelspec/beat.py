"""What a rank of a training run says of itself, and what `train --nproc` and its ranks tell each other.

Who starts processes and watches them needs no torch: so this stands apart from what runs on a rank.
"""

import json
from dataclasses import asdict, dataclass

# What `train --nproc` tells its ranks: a folder for their last beats, and rank 0 a socket for the store.
FOLDER, LISTENER = "MODELSPEC_RANKS", "MODELSPEC_STORE"
# The exit code of a rank that ended because another did.
LOST = 75


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank as the others see it: how many things it began, what it finished inside the last, its name, and where in
    the code it is. `tick` differs from beat to beat; `left` is why it has ended, if it has.
    """

    begun: int
    finished: int
    doing: str
    where: str
    collective: str | None
    tick: int
    left: str | None = None

    @property
    def text(self) -> str:
        """In what it is, like `step 12, in all_reduce (builders/parallel/learner.py:190, _sums)`."""
        return f"{self.doing}, {f'in {self.collective} ({self.where})' if self.collective else f'at {self.where}'}"

    def dumped(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Beat":
        return cls(**json.loads(text))
