"""`python -m tests.chromium`: sees to it that the browser tests have a browser, or says what to install."""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


def main() -> int:
    if find():
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing Debian's chromium for the browser tests", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "chromium"], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        return 0
    print("the browser tests need chromium: sudo apt-get install -y chromium", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
