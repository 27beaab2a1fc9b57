"""The attacker, in a process of its own: `python -m tests.attack.attacker`, which `tests.attack.trial` starts."""

import asyncio
import json
import os
import sys

from tests.attack.attacks import ATTACKS
from tests.attack.wire import Answers, Target


def main() -> None:
    """Read the attack from the first line of standard input, wait for the second, and write the answers."""
    given = json.loads(sys.stdin.readline())
    attack, target = ATTACKS[given["attack"]], Target(**given["target"])
    os.nice(10)  # the two cores are the service's and the neighbour's first: an attacker would have his own
    print("ready", flush=True)  # noqa: T201 - the trial waits for it
    sys.stdin.readline()
    answers = Answers()
    asyncio.run(attack.run(target, answers))
    json.dump(dict(answers.by_status), sys.stdout)


if __name__ == "__main__":
    main()
