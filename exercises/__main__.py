"""Checks your exercises: which of the six pass, and what is wrong with the others.

    python -m exercises                 checks exercises/ppo.py
    python -m exercises --file PATH     checks another file
    python -m exercises --json          the same as JSON
    python -m exercises walk            one real answer through all steps
    python -m exercises toy             a whole run in a second
    python -m exercises toy vs lam=0    and one with another setting beside it

Exit status: 0 if all six pass, 1 if not, 2 if the file can't be used.
"""

import argparse
from pathlib import Path

from lora_ppo.terminal import program


@program
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m exercises", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("check", "walk", "toy"), default="check", help=argparse.SUPPRESS)
    parser.add_argument("--file", default=str(Path(__file__).with_name("ppo.py")), help="the file to check")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("settings", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.what == "walk":
        from exercises.walk import walk

        return walk()
    if given.what == "toy":
        from exercises.toy import toy

        return toy(given.settings)
    from exercises.harness import check_all
    from exercises.screen import as_json, show

    if not given.json:
        return show(given.file, check_all(given.file))
    verdicts = list(check_all(given.file))
    print(as_json(verdicts))
    return 0 if all(v.passed for v in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
