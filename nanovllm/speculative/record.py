"""What the host has seen of a sequence's drafts."""

from dataclasses import dataclass

# Of the estimate of a sequence's acceptance: how much of it is the last step's, and by how much it comes back to 1 in
# each step that has drafts and does not check them, so that they are tried again now and then.
LAST_SHARE = 0.25
RECOVERY = 2**-10


@dataclass(slots=True)
class DraftRecord:
    """What the host has seen of a sequence's drafts.

    Attributes:
        num_proposed: drafts that there were for it behind the last step that it saw.
        acceptance: an estimate of the share of checked drafts that is accepted, at first hopeful.
        num_checked, num_accepted: drafts so far.
        num_unseen: drafts of steps that are launched, and whose tokens are yet to be seen.
    """

    num_proposed: int = 0
    acceptance: float = 1.0
    num_checked: int = 0
    num_accepted: int = 0
    num_unseen: int = 0

    def take_in(self, num_checked: int, num_accepted: int, num_proposed: int) -> None:
        """Counts the drafts of a step."""
        if num_checked:
            self.acceptance += LAST_SHARE * (num_accepted / num_checked - self.acceptance)
        elif self.num_proposed:
            self.acceptance += RECOVERY * (1 - self.acceptance)
        self.num_checked += num_checked
        self.num_accepted += num_accepted
        self.num_proposed = num_proposed
